"""A command as the deepspeed launcher starts it for ``ds-ring``, once signals are taken care of.

python -m ds_ring.cli.launched MODULE options
"""

from __future__ import annotations

import sys

from ds_ring.process.interruption import start


def main() -> None:
    module = sys.argv.pop(1)
    sys.argv[0] = module.rpartition(".")[2]
    start(module)


if __name__ == "__main__":
    main()
