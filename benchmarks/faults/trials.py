"""All trials of a plan, one after the other."""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.faults.judge import broken
from benchmarks.faults.plan import COMMANDS, Command, plan
from benchmarks.faults.run import START_S, Inputs, command_line, environment, essence, try_once
from ds_ring.errors import LaunchError
from ds_ring.process.launcher import ROOT
from ds_ring.testing.local_hosts import LocalHosts
from ds_ring.utils import strict_json

TEXT = "The quick brown fox jumps over the lazy dog. " * 40


def run_all(args: argparse.Namespace, folder: Path) -> Iterator[dict[str, Any]]:
    """Every trial's record, with the bars that it breaks."""
    text = folder / "text.txt"
    text.write_text(TEXT)
    inputs = Inputs(Path(args.model).resolve(), text, args.timeout_s, {})
    with ExitStack() as stack:
        machines = {
            count: stack.enter_context(LocalHosts([f"host{number + 1}" for number in range(count)], 2 // count))
            for count in dict.fromkeys(args.hosts)
        }
        # Their own sshd and network, one machine's file system.
        inputs = replace(inputs, reference=references(machines[args.hosts[0]], inputs, folder))
        for trial in plan(args.trials, args.seed, args.hosts):
            own = folder / f"trial{trial.number}"
            record = try_once(trial, machines[trial.hosts], inputs, own)
            record["broken"] = broken(record)
            shutil.rmtree(own)
            print(strict_json.dumps(record), file=sys.stderr, flush=True)
            yield record


def references(hosts: LocalHosts, inputs: Inputs, folder: Path) -> dict[str, Any]:
    """By command what an undisturbed run writes."""
    found: dict[str, Any] = {}
    command: Command
    for command in COMMANDS:
        output = folder / "reference.json"
        words = command_line(command, hosts, inputs, output)
        done = subprocess.run(
            hosts.command(hosts.names[0], words, ROOT), env=environment(), stdin=subprocess.DEVNULL,
            capture_output=True, text=True, timeout=START_S,
        )  # fmt: skip
        if done.returncode:
            raise LaunchError(f"{' '.join(words)} fails undisturbed: {done.stderr[-2000:]}", "an undisturbed run fails")
        found[command] = essence(json.loads(output.read_text()))
        output.unlink()
    return found
