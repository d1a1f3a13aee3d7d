"""Checks of this machine and of a configuration. They start nothing and change nothing."""

from __future__ import annotations

import ipaddress
import os
import shutil
import socket
from collections.abc import Iterator, Sequence

import torch

from ds_ring.cli.doctor_checkpoint import checkpoint_findings
from ds_ring.cli.findings import Finding
from ds_ring.config import RunConfig
from ds_ring.errors import ConfigError, UserError
from ds_ring.hf.dims import model_dims
from ds_ring.kernels import triton_attention
from ds_ring.kernels.jit import unavailable
from ds_ring.planning.validation import check_layout, check_workload
from ds_ring.process.hostfile import Host, read_hostfile
from ds_ring.process.launcher import deepspeed_command, gpu_count
from ds_ring.process.network import address_of
from ds_ring.transport.select import Location, select_transports
from ds_ring.utils import releases
from ds_ring.utils.device import device_name
from ds_ring.utils.model_config import read_config
from ds_ring.utils.results import versions


def examine(run: RunConfig | None, hostfile: str | None, port: int) -> list[Finding]:
    """All checks, in order. ``run`` None: those that need no configuration."""
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
    for name in releases.OLDEST:
        found = installed.get(name)
        if found is None:
            yield Finding(name, "problem", "not installed", "pip install -r requirements.txt")
        elif wrong := releases.problem(name, found):
            yield Finding(name, "problem", *wrong)
        else:
            yield Finding(name, "ok", found)


def launcher() -> Finding:
    try:
        return Finding("launcher", "ok", deepspeed_command())
    except ConfigError as error:
        return Finding("launcher", "problem", str(error), "pip install -r requirements.txt, and use its environment")


def master_port(port: int) -> Finding:
    """Whether rank 0 could listen on ``port``."""
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind(("", port))
        except OSError as error:
            fix = "another launch may still run; end it, or launch with --master_port N"
            return Finding("port", "problem", f"{port} is taken: {error.strerror}", fix)
    return Finding("port", "ok", f"{port} is free")


def reachable(hosts: Sequence[Host]) -> Iterator[Finding]:
    if len(hosts) > 1 and not shutil.which("pdsh"):
        detail = "the launcher starts other hosts with it, and it is not installed"
        yield Finding("pdsh", "problem", detail, "install pdsh")
    for host in hosts:
        name = f"host {host.name}"
        try:
            address = address_of(host.name)
        except ConfigError as error:
            yield Finding(name, "problem", str(error), "mend the name, or DNS")
        else:
            here_alone = len(hosts) > 1 and ipaddress.ip_address(address).is_loopback
            note = ", which other hosts do not reach: --master_addr must be an address" if here_alone else ""
            yield Finding(name, "ok", f"{address}{note}, {host.slots} slots")


def gpus() -> Iterator[Finding]:
    """Whether there are GPUs, all of one kind, that can read each other's memory."""
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
        fix = "use equal ones: each step waits for the slowest"
        yield Finding("GPUs", "slower", f"unlike ones: {', '.join(names)}", fix)
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
    """Whether our kernels can be built and run; nothing without a GPU."""
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
    """Whether the checkpoint can be read and its layout can run.

    ``slots``: how many ranks can be started. None: any number, on CPUs.
    """
    found = list(checkpoint_findings(run))
    yield from found
    if any(finding.outcome == "problem" for finding in found):
        return
    dims = model_dims(read_config(run.checkpoint))
    if run.parallel.auto:
        return
    wanted = run.topology.world_size
    try:
        check_layout(run, dims, wanted)
        check_workload(run, dims)
    except UserError as error:
        yield Finding("configuration", "problem", str(error))
        return
    whose = run.benchmark.implementation
    unchecked = "" if whose == "ds_ring" else f"; what {whose} itself refuses is found when it is launched"
    yield Finding("configuration", "ok", f"{run.label}: {wanted} ranks{unchecked}")
    if slots is not None and wanted > slots:
        fix = f"lower the degrees, or add {wanted - slots} GPUs"
        yield Finding("ranks", "problem", f"{wanted} are wanted, and {slots} can be started", fix)
    if gpu_count() > 1 and wanted <= gpu_count():
        locations = [Location.of(torch.device("cuda", rank)) for rank in range(wanted)]
        transports = select_transports(run.ring.transport, run.topology, locations)
        yield Finding("transport", "ok", transports.describe() or "none is needed")
