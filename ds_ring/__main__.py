"""``ds-ring``, and ``python -m ds_ring``: ``cli/main.py``, once signals are taken care of."""

from ds_ring.process.interruption import start


def main() -> None:
    start("ds_ring.cli.main")


if __name__ == "__main__":
    main()
