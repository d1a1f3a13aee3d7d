"""Several hosts on one Linux machine, for tests: network namespaces joined by a bridge, each with a name and an sshd.

Each host is a process with namespaces of its own for network, names, mounts, processes and shared memory. The file
system is shared but for ``/etc/hosts``, ``/run`` and ``/root/.ssh``. Everything ends with those processes: the kernel
takes their namespaces, links and whatever runs inside away with them. Needs root.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from types import TracebackType

from ds_ring.errors import ConfigError

NEEDED = ("ip", "unshare", "nsenter", "setpriv", "ssh", "ssh-keygen", "pdsh", "/usr/sbin/sshd")
NETWORK = "10.77.0"
START_S = 30.0

SWITCH = "ip link add name bridge type bridge && ip link set bridge up && exec sleep infinity"
HOST = """
set -e
hostname {name}
mount -t tmpfs tmpfs /run && mkdir -p /run/sshd
mkdir -p /root/.ssh && mount -t tmpfs -o mode=700 tmpfs /root/.ssh
cp {folder}/key /root/.ssh/id_ed25519
cp {folder}/key.pub /root/.ssh/authorized_keys
cp {folder}/ssh /root/.ssh/config
chmod 600 /root/.ssh/*
mount --bind {folder}/{name}.hosts /etc/hosts
ip link set lo up
until ip link show eth0 >/dev/null 2>&1; do sleep 0.05; done
ip addr add {address}/24 dev eth0 && ip link set eth0 up
exec /usr/sbin/sshd -D -e -f {folder}/{name}.sshd
"""
SSHD = """
HostKey {folder}/hostkey
PidFile none
UsePAM no
StrictModes no
PermitRootLogin yes
PasswordAuthentication no
AuthorizedKeysFile /root/.ssh/authorized_keys
"""
SSH = """
StrictHostKeyChecking no
UserKnownHostsFile /dev/null
LogLevel ERROR
"""


def unavailable() -> str | None:
    """Why this machine cannot play several hosts; None where it can."""
    if os.geteuid() != 0:
        return "needs root"
    missing = [name for name in NEEDED if shutil.which(name) is None]
    if missing:
        return f"{', '.join(missing)} not installed"
    tried = subprocess.run(["unshare", "--net", "--uts", "--mount", "--pid", "--fork", "true"], capture_output=True)
    return "namespaces are not allowed here" if tried.returncode else None


class LocalHosts:
    """Context manager: ``names`` are up inside the block.

    Args:
        own_name_is_local: as Debian installs it, ``/etc/hosts`` says that a host's own name is 127.0.1.1.

    Attributes:
        hostfile: of all hosts, with ``slots`` each.
    """

    def __init__(self, names: Sequence[str], slots: int, own_name_is_local: bool = False) -> None:
        self.names, self.slots, self._local = list(names), slots, own_name_is_local
        self._inits: dict[str, int] = {}
        self._stack = ExitStack()

    def address(self, name: str) -> str:
        return f"{NETWORK}.{self.names.index(name) + 1}"

    def __enter__(self) -> LocalHosts:
        """Raises ConfigError where this machine cannot, or a host does not come up."""
        if reason := unavailable():
            raise ConfigError(f"no hosts can be made on this machine: {reason}")
        with self._stack as stack:
            self.folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="hosts-")))
            self.hostfile = self.folder / "hostfile"
            self._write_files()
            self._inits[""] = self._start(["--net"], SWITCH)
            for number, name in enumerate(self.names):
                script = HOST.format(name=name, folder=self.folder, address=self.address(name))
                own = ["--net", "--uts", "--mount", "--pid", "--ipc", "--mount-proc"]
                self._inits[name] = self._start(own, script)
                _run("ip", "link", "add", f"to{number}", "netns", self._inits[""],
                     "type", "veth", "peer", "name", "eth0", "netns", self._inits[name])  # fmt: skip
                self._switch("ip", "link", "set", f"to{number}", "master", "bridge", "up")
            for name in self.names:
                self._wait_for(name)
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def command(self, name: str, words: Sequence[str], folder: Path | None = None) -> list[str]:
        """A command that runs ``words`` on a host."""
        return ["nsenter", "-t", str(self._inits[name]), "-n", "-u", "-m", "-p", "-i",
                f"--wd={folder or Path.cwd()}", "--", *words]  # fmt: skip

    def link(self, name: str, state: str) -> None:
        """Set the link of a host ``up`` or ``down``."""
        self._switch("ip", "link", "set", f"to{self.names.index(name)}", state)

    def processes(self, name: str) -> list[int]:
        """What runs on a host but for its own sshd, by the process ids of this machine."""
        space = os.readlink(f"/proc/{self._inits[name]}/ns/pid")
        found = []
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                if os.readlink(folder / "ns/pid") == space and int(folder.name) != self._inits[name]:
                    found.append(int(folder.name))
            except OSError:
                continue
        return found

    def _write_files(self) -> None:
        self.hostfile.write_text("".join(f"{name} slots={self.slots}\n" for name in self.names))
        for key in ("key", "hostkey"):
            _run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", self.folder / key)
        (self.folder / "ssh").write_text(SSH)
        for name in self.names:
            lines = {other: self.address(other) for other in self.names}
            if self._local:
                lines[name] = "127.0.1.1"
            hosts = [("localhost", "127.0.0.1"), *lines.items()]
            (self.folder / f"{name}.hosts").write_text("".join(f"{address} {host}\n" for host, address in hosts))
            (self.folder / f"{name}.sshd").write_text(SSHD.format(folder=self.folder))

    def _start(self, own: Sequence[str], script: str) -> int:
        """A process with namespaces of its own, which runs ``script``: its id."""
        # It ends when this thread does, however that ends, and everything in its namespaces with it.
        words = ["setpriv", "--pdeathsig", "KILL", "unshare", *own, "--fork", "--kill-child", "sh", "-c", script]
        with (self.folder / "log").open("a") as log:
            process = subprocess.Popen(
                words, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
            )  # fmt: skip
        self._stack.callback(process.wait)
        self._stack.callback(process.kill)
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
        _until(
            lambda: children.exists() and bool(children.read_text()), "a namespace was not made", self.folder / "log"
        )
        child = int(children.read_text().split()[0])
        self._stack.callback(_end, child, process)
        return child

    def _wait_for(self, name: str) -> None:
        def answers() -> bool:
            asked = self.command(self.names[0], ["ssh", "-o", "ConnectTimeout=1", name, "hostname"])
            return subprocess.run(asked, capture_output=True, text=True).stdout.strip() == name

        _until(answers, f"{name} did not answer", self.folder / "log")

    def _switch(self, *words: str) -> None:
        _run("nsenter", "-t", self._inits[""], "-n", *words)


def _run(*words: object) -> None:
    done = subprocess.run([str(word) for word in words], capture_output=True, text=True)
    if done.returncode:
        raise ConfigError(f"{' '.join(map(str, words))}: {done.stderr.strip()}")


def _until(condition: Callable[[], bool], what: str, log: Path) -> None:
    deadline = time.monotonic() + START_S
    while not condition():
        if time.monotonic() > deadline:
            raise ConfigError(f"{what} in {START_S:.0f} s: {log.read_text()[-500:]}")
        time.sleep(0.05)


def _end(child: int, unshare: subprocess.Popen[bytes]) -> None:
    """Kill the first process of namespaces, and wait until what runs in them is gone: then unshare has seen it end."""
    with suppress(ProcessLookupError):
        os.kill(child, signal.SIGKILL)
    with suppress(subprocess.TimeoutExpired):
        unshare.wait(START_S)
