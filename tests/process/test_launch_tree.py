"""Which processes a rank must keep above it, from what Linux shows of them."""

import base64

import pytest

from ds_ring.process import launch_tree
from ds_ring.process.launch_tree import Link, find, find_pdsh, links, lost_hosts

RANK, LAUNCH, RUNNER, SHELL, PDSH, SSH, SSHD, LISTENER = range(10, 18)
WORLD = ["--world_info=abc=", "--master_port=29500"]
LAUNCH_WORDS = ["python", "-u", "-m", "deepspeed.launcher.launch", *WORLD, "x.py"]


@pytest.fixture
def table(monkeypatch):
    """Shows these processes, by number (parent, command), to the rank."""

    def show(processes):
        monkeypatch.setattr(launch_tree.os, "getpid", lambda: RANK)
        monkeypatch.setattr(launch_tree.os, "getppid", lambda: processes[RANK][0])
        monkeypatch.setattr(launch_tree, "all_processes", lambda: list(processes))
        monkeypatch.setattr(launch_tree, "parent_of", lambda pid: processes.get(pid, (None,))[0])
        monkeypatch.setattr(launch_tree, "command_of", lambda pid: processes.get(pid, (None, []))[1])
        monkeypatch.setattr(launch_tree, "name_of", lambda pid: processes[pid][1][0] if pid in processes else "")
        return processes

    return show


def test_on_one_host_the_launcher_and_its_runner_count(table):
    """Not the ssh session that a user started them in, and may leave."""
    shown = table({
        RANK: (LAUNCH, ["python", "x.py"]), LAUNCH: (RUNNER, LAUNCH_WORDS), RUNNER: (SHELL, ["python", "deepspeed"]),
        SHELL: (SSHD, ["bash"]), SSHD: (1, ["sshd: user@pts/0"]),
    })  # fmt: skip
    found = links()
    assert found == [Link(RANK, LAUNCH), Link(LAUNCH, RUNNER)]
    assert all(link.holds() for link in found)
    shown[LAUNCH] = (1, LAUNCH_WORDS)
    assert [link.holds() for link in found] == [True, False]


def test_above_another_launcher_nothing_counts(table):
    table({RANK: (LAUNCH, ["python", "x.py"]), LAUNCH: (SHELL, ["torchrun"]), SHELL: (1, ["bash"])})
    assert links() == [Link(RANK, LAUNCH)]
    assert find_pdsh() is None


@pytest.mark.parametrize("on_the_launchers_host", [True, False])
def test_by_ssh_all_up_to_its_server_counts_and_pdsh_where_it_is_here(on_the_launchers_host, table):
    shown = {
        RANK: (LAUNCH, ["python", "x.py"]), LAUNCH: (SHELL, LAUNCH_WORDS),
        SHELL: (SSHD, ["bash", "-c", " ".join(LAUNCH_WORDS)]),
        SSHD: (LISTENER, ["sshd: root@notty"]), LISTENER: (1, ["sshd"]),
    }  # fmt: skip
    if on_the_launchers_host:
        shown |= {
            PDSH: (RUNNER, ["pdsh", "-S", "-w", "a,b", *LAUNCH_WORDS]),
            SSH: (PDSH, ["ssh", "a", " ".join(LAUNCH_WORDS)]),
            RUNNER: (1, ["python", "deepspeed"]),
            99: (1, ["pdsh", "-w", "a,b", "python", "--world_info=other=", WORLD[1]]),
        }  # fmt: skip
    table(shown)
    above = [Link(RANK, LAUNCH), Link(LAUNCH, SHELL), Link(SHELL, SSHD)]
    assert links() == above + [Link(PDSH, RUNNER)] * on_the_launchers_host
    assert find("pdsh", "ssh") == ([PDSH, SSH] if on_the_launchers_host else [])


def test_an_sshd_may_start_the_launcher_without_a_shell(table):
    table({RANK: (LAUNCH, ["python", "x.py"]), LAUNCH: (SSHD, LAUNCH_WORDS), SSHD: (1, ["sshd-session: root@notty"])})
    assert links() == [Link(RANK, LAUNCH), Link(LAUNCH, SSHD)]


def test_a_host_is_lost_when_its_ssh_has_ended_and_pdsh_goes_on(table):
    world = base64.urlsafe_b64encode(b'{"a": [0], "b": [0]}').decode()
    words = [*LAUNCH_WORDS[:4], f"--world_info={world}", WORLD[1], "x.py"]
    shown = {
        RANK: (LAUNCH, ["python", "x.py"]), LAUNCH: (SSHD, words), SSHD: (1, ["sshd: root@notty"]),
        PDSH: (RUNNER, ["pdsh", "-w", "a,b", *words]), SSH: (PDSH, ["ssh", "-x", "a", " ".join(words)]),
        98: (PDSH, ["ssh", "-x", "b", " ".join(words)]),
    }  # fmt: skip
    table(shown)
    assert lost_hosts() == []
    del shown[98]
    assert lost_hosts() == ["b"]
    del shown[PDSH], shown[SSH]
    assert lost_hosts() == []
