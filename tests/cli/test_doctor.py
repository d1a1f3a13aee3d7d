"""Doctor's checks: problems are found before anything is started."""

import argparse
import json
import re
import shutil
import socket

import pytest

from ds_ring.cli import doctor as doctor_command
from ds_ring.cli import doctor_checks as doctor
from ds_ring.cli import options
from ds_ring.cli.seeded_checkpoint import byte_tokenizer
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
    assert by_name["host a..b"].detail.startswith("the host name a..b does not resolve: ")
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

    @pytest.mark.parametrize(
        ("change", "words"),
        [
            ({"num_hidden_layers": 2}, "has layers up to number 2 (model.layers.2.self_attn.v_proj.weight), but its"),
            ({"hidden_size": "64"}, "holds no config that transformers can read: .*'hidden_size'"),
            ({"hidden_act": "x"}, "makes no causal LM of this LlamaConfig: hidden_act='x'"),
            ({"transformers_weights": "other.safetensors"}, "lacks the file that its config.json names"),
            ({"head_dim": 3}, "LlamaForCausalLM fails at its first forward with this config: "),
        ],
        ids=str,
    )
    def test_a_checkpoint_that_no_run_would_take(self, checkpoint, change, words, tmp_path):
        shutil.copytree(checkpoint, tmp_path, dirs_exist_ok=True)
        file = tmp_path / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | change))
        by_name = self.examined(str(tmp_path))
        assert list(by_name) == ["checkpoint"]
        assert by_name["checkpoint"].outcome == "problem"
        assert re.search(words.replace("(", r"\(").replace(")", r"\)"), by_name["checkpoint"].detail)

    def test_what_a_checkpoint_holds(self, checkpoint, tmp_path):
        by_name = self.examined(checkpoint)
        assert by_name["checkpoint"].detail == f"{checkpoint}: llama, 3 layers, fp32, 1 file(s) of weights"
        assert by_name["tokenizer"].detail == "none, which generate and score need"
        shutil.copytree(checkpoint, tmp_path, dirs_exist_ok=True)
        byte_tokenizer().save_pretrained(tmp_path)
        assert self.examined(str(tmp_path))["tokenizer"].outcome == "ok"
        (tmp_path / "tokenizer.json").write_text("{}")
        broken = self.examined(str(tmp_path))["tokenizer"]
        assert broken.outcome == "problem"
        assert broken.detail.startswith(f"{tmp_path}/tokenizer.json cannot be read by tokenizers ")

    def test_a_dtype_of_the_checkpoint_s_that_no_run_can_have(self, checkpoint, tmp_path):
        shutil.copytree(checkpoint, tmp_path, dirs_exist_ok=True)
        file = tmp_path / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {"dtype": "float64"}))
        args = argparse.Namespace(
            config=None, model=str(tmp_path), set=[], hostfile=None, master_port=29500, output=None
        )
        with pytest.raises(options.Refused, match="checks found a problem") as refused:
            doctor_command.work(args)
        checks = refused.value.document["checks"]
        (found,) = [check for check in checks if check["what"] == "configuration"]
        assert found["detail"].startswith(f'dtype="float64", which the checkpoint {tmp_path} says, is not supported')

    def test_a_checkpoint_that_is_not_there(self, tmp_path):
        assert self.examined(str(tmp_path / "none"))["checkpoint"].outcome == "problem"
