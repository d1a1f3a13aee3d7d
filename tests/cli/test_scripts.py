"""The scripts in launch/: nothing but the call of a command, which imports torch only when it has work to do."""

from __future__ import annotations

import re
import subprocess
import sys

from ds_ring.process.launcher import ROOT
from tests.helpers.limits import HANG_S

SCRIPTS = sorted((ROOT / "launch").glob("*.py"))
CALL = r'^    start\("((?:ds_ring|benchmarks)\.cli\.\w+)"\)$'


def test_every_script_calls_the_command_of_its_name():
    for script in SCRIPTS:
        text = script.read_text()
        assert re.search(CALL, text, re.MULTILINE).group(1).endswith(f".cli.{script.stem}"), script
        assert len(text.splitlines()) <= 12, script


def test_options_are_read_without_torch():
    """A wrong option is refused at once: importing torch, transformers and deepspeed takes seconds."""
    modules = [re.search(CALL, s.read_text(), re.MULTILINE).group(1) for s in SCRIPTS]
    program = f"""
import importlib, sys
for module in {modules!r}:
    importlib.import_module(module)
heavy = {{"torch", "transformers", "deepspeed", "matplotlib"}} & sys.modules.keys()
sys.exit(", ".join(sorted(heavy)))
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=HANG_S)
    assert done.stderr.strip() == ""
