"""`dsu` with two samples per shard, so that a few images fill several shards, which can be divided.

For `kills.Forks`, or as a script.
"""

from dsu_cache import Store

__all__ = ["run"]


def run() -> None:
    """Run the command line."""
    from dsu_cli.main import run as run_dsu

    Store.create.__func__.__defaults__ = (2, None)  # type: ignore[attr-defined]
    run_dsu()


if __name__ == "__main__":
    run()
