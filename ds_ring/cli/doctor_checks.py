"""What stands in the way of a run on this machine, and what to do about it. Checks start nothing and change nothing."""

from __future__ import annotations

import os
import shutil
import socket
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from packaging.version import Version

from ds_ring.config import RunConfig
from ds_ring.errors import ConfigError, UserError
from ds_ring.hf.checkpoint import Checkpoint
from ds_ring.hf.dims import model_dims, read_config
from ds_ring.kernels import triton_attention
from ds_ring.kernels.jit import unavailable
from ds_ring.planning.validation import check_layout, check_workload
from ds_ring.process.launcher import deepspeed_command, gpu_count
from ds_ring.transport.select import Location, select_transports
from ds_ring.utils.hardware import device_name
from ds_ring.utils.results import versions

Outcome = Literal["ok", "slower", "problem"]
OLDEST = {"python": "3.11", "torch": "2.11", "transformers": "5.17", "deepspeed": "0.19"}


@dataclass(frozen=True)
class Finding:
    """``slower``: it runs, but not as fast as it could; ``fix`` is empty where nothing is wrong."""

    what: str
    outcome: Outcome
    detail: str
    fix: str = ""


@dataclass(frozen=True)
class Host:
    """A line of a hostfile."""

    name: str
    slots: int


def examine(run: RunConfig | None, hostfile: str | None, port: int) -> list[Finding]:
    """Every check in order; ``run`` None: those that need no configuration."""
    findings = [*packages(), launcher(), master_port(port)]
    hosts: list[Host] | None = None
    if hostfile is not None:
        try:
            hosts = read_hostfile(hostfile)
            findings += reachable(hosts)
        except ConfigError as error:
            findings.append(Finding("hostfile", "problem", str(error), "give one line a host: NAME slots=N"))
    findings += [*gpus(), *kernels()]
    if run is not None:
        findings += configuration(run, sum(host.slots for host in hosts) if hosts else gpu_count() or None)
    return findings


def packages() -> Iterator[Finding]:
    installed = versions()
    for name, oldest in OLDEST.items():
        found = installed.get(name)
        if found is None:
            yield Finding(name, "problem", "not installed", "pip install -r requirements.txt")
        elif Version(found).release < Version(oldest).release:
            yield Finding(name, "problem", f"{found} is older than {oldest}", f"install {name} {oldest} or newer")
        else:
            yield Finding(name, "ok", found)


def launcher() -> Finding:
    try:
        return Finding("launcher", "ok", deepspeed_command())
    except ConfigError as error:
        return Finding("launcher", "problem", str(error), "pip install -r requirements.txt, and use its environment")


def master_port(port: int) -> Finding:
    """Whether rank 0 could listen there."""
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind(("", port))
        except OSError as error:
            fix = "another launch may still run; end it, or launch with --master_port N"
            return Finding("port", "problem", f"{port} is taken: {error.strerror}", fix)
    return Finding("port", "ok", f"{port} is free")


def read_hostfile(path: str) -> list[Host]:
    """Raise ConfigError for a file that cannot be read, or a line that the launcher would not understand.

    The launcher itself goes on with this machine alone where the file is missing.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}; the launcher would use this machine alone") from None
    hosts = []
    for number, line in enumerate(lines, 1):
        words = line.partition("#")[0].split()
        if not words:
            continue
        if len(words) != 2 or not words[1].startswith("slots=") or not words[1][6:].isdigit():
            raise ConfigError(f'{path}, line {number}: "{line.strip()}" is not NAME slots=N')
        hosts.append(Host(words[0], int(words[1][6:])))
    if not hosts:
        raise ConfigError(f"{path} names no host")
    if len({host.name for host in hosts}) < len(hosts):
        raise ConfigError(f"{path} names a host twice")
    return hosts


def reachable(hosts: Sequence[Host]) -> Iterator[Finding]:
    if len(hosts) > 1 and not shutil.which("pdsh"):
        yield Finding(
            "pdsh", "problem", "the launcher starts other hosts with it, and it is not installed", "install pdsh"
        )
    for host in hosts:
        try:
            address = socket.gethostbyname(host.name)
        except OSError as error:
            yield Finding(
                f"host {host.name}", "problem", f"its name does not resolve: {error}", "mend the name, or DNS"
            )
        else:
            yield Finding(f"host {host.name}", "ok", f"{address}, {host.slots} slots")


def gpus() -> Iterator[Finding]:
    count = gpu_count()
    if not count:
        asked = os.environ.get("DS_ACCELERATOR") == "cpu"
        why = "DS_ACCELERATOR=cpu" if asked else f"PyTorch {torch.__version__} sees none"
        if not asked and shutil.which("nvidia-smi"):
            fix = "install a CUDA build of PyTorch, and mind CUDA_VISIBLE_DEVICES"
            yield Finding("GPUs", "problem", f"{why}, but nvidia-smi is there", fix)
        else:
            yield Finding("GPUs", "ok", f"none ({why}): ranks run on the CPU")
        return
    names = dict.fromkeys(device_name(torch.device("cuda", i)) for i in range(count))
    if len(names) > 1:
        yield Finding(
            "GPUs", "slower", f"unlike ones: {', '.join(names)}", "use equal ones: each step waits for the slowest"
        )
    else:
        yield Finding("GPUs", "ok", f"{count} x {next(iter(names))}")
    apart = [
        (a, b) for a in range(count) for b in range(count) if a != b and not torch.cuda.can_device_access_peer(a, b)
    ]
    if apart:
        pairs = ", ".join(f"{a} and {b}" for a, b in apart if a < b or (b, a) not in apart)
        fix = "see nvidia-smi topo -m; inside containers give all GPUs and --ipc=host"
        yield Finding("peer memory", "slower", f"GPUs {pairs} do not reach each other: K/V go by NCCL", fix)
    elif count > 1:
        yield Finding("peer memory", "ok", "every GPU reads every other's: K/V go by copy engine")


def kernels() -> Iterator[Finding]:
    if not gpu_count():
        return
    device = torch.device("cuda", 0)
    for name, reason in (
        ("attention512", unavailable(device)),
        ("Triton kernels", triton_attention.unavailable(device)),
    ):
        fix = "install the CUDA toolkit (nvcc), or set CUDA_HOME" if reason and "nvcc" in reason else ""
        yield Finding(name, "slower" if reason else "ok", reason or "can be built", fix)
    version = torch.backends.cudnn.version()
    yield Finding("cuDNN", "ok" if version else "slower", str(version or "missing: FlashAttention-2 takes its place"))


def configuration(run: RunConfig, slots: int | None) -> Iterator[Finding]:
    """``slots``: ranks that can be started; None: as many as asked for, on CPUs."""
    try:
        path = run.checkpoint
        Checkpoint.open(path)
        dims = model_dims(read_config(path))
    except UserError as error:
        yield Finding("checkpoint", "problem", str(error))
        return
    yield Finding("checkpoint", "ok", f"{path}: {dims.model_type}, {dims.num_layers} layers")
    wanted = run.topology.world_size
    if not run.parallel.auto:
        try:
            check_layout(run, dims, wanted)
            check_workload(run, dims)
        except UserError as error:
            yield Finding("configuration", "problem", str(error))
            return
        yield Finding("configuration", "ok", f"{run.label}: {wanted} ranks")
        if slots is not None and wanted > slots:
            fix = f"lower the degrees, or add {wanted - slots} GPUs"
            yield Finding("ranks", "problem", f"{wanted} are wanted, and {slots} can be started", fix)
    if gpu_count() > 1 and not run.parallel.auto and wanted <= gpu_count():
        locations = [Location.of(torch.device("cuda", rank)) for rank in range(wanted)]
        yield Finding(
            "transport",
            "ok",
            select_transports(run.ring.transport, run.topology, locations).describe() or "none is needed",
        )


def document(findings: Sequence[Finding]) -> dict[str, Any]:
    return {
        "problems": sum(finding.outcome == "problem" for finding in findings),
        "slower": sum(finding.outcome == "slower" for finding in findings),
        "checks": [vars(finding) for finding in findings],
    }


def show(findings: Sequence[Finding], say: Callable[[str], None] = lambda line: print(line, file=sys.stderr)) -> None:
    for finding in findings:
        say(f"{finding.outcome:8} {finding.what}: {finding.detail}" + (f"; {finding.fix}" if finding.fix else ""))
