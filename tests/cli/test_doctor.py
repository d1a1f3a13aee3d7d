"""Doctor's checks: problems are found before anything is started."""

import socket

import pytest

from ds_ring.cli import doctor_checks as doctor
from ds_ring.config import RunConfig
from ds_ring.process.hostfile import Host
from ds_ring.process.launcher import reserved_port
from tests.helpers.tiny_models import build, llama_gqa


@pytest.fixture
def no_gpu(monkeypatch):
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    build(llama_gqa()).save_pretrained(folder)
    return str(folder)


def found(findings):
    return {finding.what: finding for finding in findings}


def test_packages_that_are_old_or_missing(monkeypatch):
    versions = {"python": "3.11.7", "torch": "2.9.1+cu128", "transformers": "5.17.0"}
    monkeypatch.setattr(doctor, "versions", lambda: versions)
    by_name = found(doctor.packages())
    assert {name: one.outcome for name, one in by_name.items()} == {
        "python": "ok", "torch": "problem", "transformers": "ok", "deepspeed": "problem",
    }  # fmt: skip
    assert by_name["torch"].detail == "2.9.1+cu128 is older than 2.11"
    assert by_name["deepspeed"].detail == "not installed"


def test_a_port_that_is_taken():
    with reserved_port() as port:
        with socket.socket() as listener:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(("", port))
            listener.listen()
            taken = doctor.master_port(port)
            assert (taken.outcome, taken.detail.split(":")[0]) == ("problem", f"{port} is taken")
            assert "--master_port" in taken.fix
        assert doctor.master_port(port).outcome == "ok"


def test_hosts_are_reachable_by_name_and_need_pdsh(monkeypatch):
    monkeypatch.setattr(doctor.shutil, "which", lambda _: None)
    hosts = [Host("localhost", 8), Host("no-such-host.invalid", 8), Host("a..b", 8), Host("x" * 64 + ".com", 8)]
    by_name = found(doctor.reachable(hosts))
    assert [one.outcome for one in by_name.values()] == ["problem", "ok", *["problem"] * 3]
    assert by_name["host a..b"].detail.startswith("its name does not resolve: ")
    assert "pdsh" in by_name
    assert by_name["host localhost"].detail == (
        "127.0.0.1, which other hosts do not reach: --master_addr must be an address, 8 slots"
    )
    (alone,) = doctor.reachable([Host("localhost", 8)])
    assert alone.detail == "127.0.0.1, 8 slots"


@pytest.mark.usefixtures("no_gpu")
class TestConfiguration:
    def examined(self, checkpoint, slots=None, **options):
        return found(doctor.configuration(RunConfig.load({}, model=checkpoint, **options), slots))

    def test_one_that_can_run(self, checkpoint):
        by_name = self.examined(checkpoint, slots=3, ring_degree=3)
        assert {one.outcome for one in by_name.values()} == {"ok"}
        assert by_name["configuration"].detail == "ring3: 3 ranks"

    def test_more_ranks_than_can_be_started(self, checkpoint):
        ranks = self.examined(checkpoint, slots=2, ring_degree=3)["ranks"]
        assert (ranks.outcome, ranks.detail) == ("problem", "3 are wanted, and 2 can be started")

    def test_a_rule_that_is_broken(self, checkpoint):
        broken = self.examined(checkpoint, ulysses_degree=2)["configuration"]
        assert broken.outcome == "problem"
        assert "num_heads=9 is not divisible by ulysses_degree=2" in broken.detail

    def test_a_batch_smaller_than_the_replicas(self, checkpoint):
        broken = self.examined(checkpoint, dp_size=2)["configuration"]
        assert "batch_size=1 leaves some of dp_size=2 replicas without a sequence" in broken.detail

    def test_a_checkpoint_that_is_not_there(self, tmp_path):
        assert self.examined(str(tmp_path / "none"))["checkpoint"].outcome == "problem"
