"""`python -m dsu` is the command: here alone `dsu` imports `dsu_cli`, since this is where Python looks for it."""

if __name__ == "__main__":
    from dsu_cli.main import run

    run()
