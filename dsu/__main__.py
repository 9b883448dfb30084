"""Run the command line by `python -m dsu`. Only this module of `dsu` imports `dsu_cli`."""

if __name__ == "__main__":
    from dsu_cli.main import run

    run()
