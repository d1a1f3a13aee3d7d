"""Several runs of scripts in the same ranks: what the launcher starts for ``launching.in_one_start``.

A start takes longer than most runs. Every run has the arguments, the folder, the output and the exit code of its own,
as if it had been started alone; process groups stay from one to the next.
"""

import json
import logging
import os
import runpy
import sys
import traceback
from pathlib import Path

from ds_ring.cli import options

folder, commands = Path(sys.argv[1]), json.loads(sys.argv[2])
rank, home = os.environ["RANK"], Path.cwd()
leave = options.leave


def end_script(code: int, together: bool = False) -> None:
    """In the place of ``leave``, a script's last call, which would end the process."""
    sys.exit(code)


options.leave = end_script

for number, command in enumerate(commands):
    sys.argv = command
    for stream, name in ((1, "out"), (2, "err")):
        with (folder / f"{number}.{rank}.{name}").open("w") as file:
            os.dup2(file.fileno(), stream)
    code = 1
    try:
        runpy.run_path(command[0], run_name="__main__")
    except SystemExit as end:
        code = end.code or 0
    except BaseException:
        traceback.print_exc()
    for file in (sys.stdout, sys.stderr):
        file.flush()
    os.chdir(home)
    logging.getLogger("ds_ring").handlers.clear()
    (folder / f"{number}.{rank}.code").write_text(str(code))
leave(0)
