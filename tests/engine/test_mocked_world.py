"""The world that the tests of engines run in is as strict as a network."""

from __future__ import annotations

import math

import pytest
import torch

from ds_ring.engine.engine import Engine
from ds_ring.errors import TransportError
from ds_ring.hf.decoder import Decoder
from ds_ring.parallel.topology import Topology
from ds_ring.transport.mesh import Mesh
from tests.helpers.mocked_world import one_process, serve
from tests.helpers.process_group_world import ProcessGroupWorld
from tests.helpers.tiny_models import build, gpt_neox, tokens


def test_the_mocked_wire_shows_a_buffer_reused_or_read_too_early():
    def work(rank: int) -> list[float]:
        mesh = Mesh.from_process_groups(Topology(pp=2))
        buffer = torch.ones(3)
        message = [(1 - rank, buffer)]
        pending = mesh["pp"].exchange(*((message, []) if rank == 0 else ([], message)))
        early = buffer.tolist()
        if rank == 0:
            buffer.zero_()
        mesh["world"].barrier()
        pending.wait()
        return early + buffer.tolist()

    with one_process():
        received = ProcessGroupWorld(2).run(work)[1]
    assert all(math.isnan(x) for x in received[:3])
    assert received[3:] == [0.0, 0.0, 0.0]


def test_the_mocked_wire_rejects_messages_of_unequal_shape():
    def work(rank: int) -> None:
        pp = Mesh.from_process_groups(Topology(pp=2))["pp"]
        pp.exchange(*([(1, torch.ones(3))], []) if rank == 0 else ([], [(0, torch.ones(4))])).wait()

    with one_process(), pytest.raises(TransportError, match=r"\(3,\).*sent, \(4,\) expected"):
        ProcessGroupWorld(2).run(work)


@pytest.mark.parametrize("where", ["layers", "between"])
def test_the_mocked_world_raises_what_failed_first_and_stops_the_others(where):
    def work(engine: Engine) -> None:
        def fail(*args: object) -> None:
            raise ValueError("only here")

        if engine.mesh.rank == 3:
            if where == "between":
                fail()
            Decoder.of(engine.model).layers[-1].register_forward_hook(fail)
        engine(tokens(1, 63))

    with pytest.raises(ValueError, match="only here"):
        serve(build(gpt_neox(heads=4, layers=2)), work, tp_size=2, pp_size=2)
