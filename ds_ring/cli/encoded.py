"""A command whose arguments come encoded, from ``ds-ring`` with ``--hostfile``: see ``process/arguments.py``.

python -m ds_ring.cli.encoded LETTERS
"""

from __future__ import annotations

import os
import sys

from ds_ring.process.arguments import decode
from ds_ring.process.interruption import start


def main() -> None:
    module, arguments, environment = decode(sys.argv[-1])
    os.environ.update({name: value for name, value in environment.items() if name not in os.environ})
    sys.argv = [module.rpartition(".")[2], *arguments]
    start(module)


if __name__ == "__main__":
    main()
