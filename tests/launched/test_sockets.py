"""Where a run's processes listen: on one host on the loopback interface alone."""

import os
import socket

import pytest

from tests.helpers.launching import deepspeed, last_line
from tests.helpers.sockets import sockets_of

pytestmark = pytest.mark.launch

OF_A_USER = """
import json, os, socket, sys
from dataclasses import asdict
import torch
from deepspeed import comm
from ds_ring.cli.options import leave
from ds_ring.config import RunConfig
from ds_ring.engine.connect import connect
from tests.helpers.sockets import sockets_of

mesh = connect(RunConfig.load({"dtype": "fp32"}, ring_degree=2))
comm.barrier(comm.new_group([0, 1]))
mesh["ring"].all_gather(torch.ones(3))
pids = {"rank": os.getpid(), "launch.py": os.getppid()}
own = {name: [asdict(found) | {"stays": found.stays_here} for found in sockets_of(pid)] for name, pid in pids.items()}
everyone = mesh["world"].all_gather_objects(own)
if mesh.rank == 0:
    print(json.dumps(everyone), flush=True)
leave(0)
"""


def test_addresses_are_read_as_they_are():
    with socket.socket() as anywhere, socket.socket(socket.AF_INET6) as here:
        for listener, address in ((anywhere, "0.0.0.0"), (here, "::1")):
            listener.bind((address, 0))
            listener.listen()
        found = {(one.address, one.port): one.stays_here for one in sockets_of(os.getpid()) if one.listens}
        assert found["0.0.0.0", anywhere.getsockname()[1]] is False
        assert found["::1", here.getsockname()[1]] is True


def test_no_socket_but_loopback_on_one_host(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(OF_A_USER)
    ranks = last_line(deepspeed(2, script))
    assert len(ranks) == 2
    for rank in ranks:
        assert sum(one["listens"] for one in rank["rank"]) >= 1, "a group listens"
        assert [one for name in rank for one in rank[name] if not one["stays"]] == []
