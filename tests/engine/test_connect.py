"""How long the ranks of a launch wait for one another, and over which interface they meet."""

import os
import warnings
from datetime import timedelta

import pytest
import torch

from ds_ring.engine import connect
from ds_ring.engine.connect import _group_timeout
from ds_ring.process import network


def test_process_groups_wait_for_longer_than_the_watch():
    assert _group_timeout(1800).total_seconds() > 1800 + 10
    assert 2**31 > 1e3 * _group_timeout(0).total_seconds() == 1e3 * _group_timeout(2**62).total_seconds()


@pytest.mark.parametrize("agent", ["True", None], ids=["torchrun", "deepspeed"])
def test_process_groups_listen_on_one_interface_whatever_launched_the_ranks(agent, monkeypatch):
    """That of the way to rank 0's host, here this machine's loopback one."""
    launched = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "head", "MASTER_PORT": "29500"}
    for name, value in launched.items():
        monkeypatch.setenv(name, value)
    for name in ("LOCAL_SIZE", "CROSS_SIZE", "TORCHELASTIC_USE_AGENT_STORE", *network.INTERFACES):
        monkeypatch.setenv(name, "")  # so that it is as it was after the test
        monkeypatch.delenv(name)
    if agent is not None:
        monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", agent)
    made = []

    def init(backend, store=None, **options):
        made.append((backend, store, [os.environ[name] for name in network.INTERFACES]))

    monkeypatch.setattr(torch.distributed, "init_process_group", init)
    monkeypatch.setattr(connect, "meet", lambda *_: "our store")
    connect._init_process_group("gloo", torch.device("cpu"), timedelta(seconds=1), 1)
    assert made == [("gloo", None if agent else "our store", ["lo", "=lo"])]


def test_one_deprecation_of_torch_is_not_said():
    """Nobody can mend it who reads it, and every rank would say it."""
    said = "`torch.distributed.all_gather_into_tensor` is deprecated. Please use `torch.distributed.all_gather_single`"
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        connect._leave_out_a_deprecation()
        for text in (said, said.replace("all_gather_into_tensor", "all_reduce")):
            warnings.warn(text, FutureWarning, stacklevel=1)
    assert [str(one.message) for one in heard] == [said.replace("all_gather_into_tensor", "all_reduce")]
