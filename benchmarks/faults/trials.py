"""All trials of a plan, some of them at once, each on hosts of its own."""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import ExitStack
from pathlib import Path
from queue import SimpleQueue
from typing import Any

from benchmarks.faults.judge import broken
from benchmarks.faults.plan import COMMANDS, Command, Trial, plan
from benchmarks.faults.run import RANKS, START_S, Inputs, command_line, environment, essence, try_once
from ds_ring.errors import LaunchError
from ds_ring.process.launcher import ROOT
from ds_ring.testing.local_hosts import LocalHosts
from ds_ring.utils import strict_json

TEXT = "The quick brown fox jumps over the lazy dog. " * 40


def run_all(args: argparse.Namespace, folder: Path) -> Iterator[dict[str, Any]]:
    """Every trial's record, with the bars that it breaks."""
    text = folder / "text.txt"
    text.write_text(TEXT)
    inputs = Inputs(Path(args.model).resolve(), text, args.timeout_s, args.connect_s, {})
    with ExitStack() as stack:
        # Their own sshd and network, one machine's file system.
        sets = [
            {count: stack.enter_context(made_hosts(count)) for count in dict.fromkeys(args.hosts)}
            for _ in range(args.at_once)
        ]
        free: SimpleQueue[dict[int, LocalHosts]] = SimpleQueue()
        for machines in sets:
            free.put(machines)

        def tried(trial: Trial) -> dict[str, Any]:
            machines, own = free.get(), folder / f"trial{trial.number}"
            try:
                record = try_once(trial, machines[trial.hosts], inputs, own)
            finally:
                free.put(machines)
                shutil.rmtree(own, ignore_errors=True)
            return {**record, "broken": broken(record)}

        def referred(command: Command) -> Any:
            machines = free.get()
            try:
                return reference(command, machines[args.hosts[0]], inputs, folder)
            finally:
                free.put(machines)

        pool = ThreadPoolExecutor(args.at_once)
        stack.callback(pool.shutdown, cancel_futures=True)
        inputs.reference.update(zip(COMMANDS, pool.map(referred, COMMANDS), strict=True))
        for done in as_completed([pool.submit(tried, trial) for trial in plan(args.trials, args.seed, args.hosts)]):
            print(strict_json.dumps(done.result()), file=sys.stderr, flush=True)
            yield done.result()


def made_hosts(count: int) -> LocalHosts:
    return LocalHosts([f"host{number + 1}" for number in range(count)], RANKS // count)


def reference(command: Command, hosts: LocalHosts, inputs: Inputs, folder: Path) -> Any:
    """What an undisturbed run of a command writes, as ``essence`` has it."""
    output = folder / f"reference {command}.json"
    words = command_line(command, hosts, inputs, output)
    what = f"an undisturbed run of {command}"
    try:
        done = subprocess.run(
            hosts.command(hosts.names[0], words, ROOT), env=environment(), stdin=subprocess.DEVNULL,
            capture_output=True, text=True, timeout=START_S,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        raise LaunchError(f"{what} took longer than {START_S:.0f} s", "an undisturbed run is late") from None
    if done.returncode:
        said = " / ".join(done.stderr.splitlines()[-5:])
        raise LaunchError(f"{what} ended with exit code {done.returncode}: {said}", "an undisturbed run fails")
    return essence(json.loads(output.read_text()))
