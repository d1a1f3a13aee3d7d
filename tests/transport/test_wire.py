"""What ranks tell each other: every kind comes back as it was, and nothing is pickle."""

import json
import pickle
import socket
from dataclasses import dataclass

import pytest
import torch

from ds_ring.errors import DisagreementError
from ds_ring.testing.threaded import ThreadedWorld
from ds_ring.transport import wire
from ds_ring.transport.select import Location

VALUES = [
    None, True, -3, 2**80, 0.1, float("inf"), "", 'a "quoted" $(name)\n', "\udcff", b"\x00\xff", [1, [2.5, None]], (),
    ("rank", 3), {"a": (1, 2), 3: b"x", (4, 5): None}, {"dict": [1], "tensor": "x"}, frozenset({1, 2, 3}), {1, 2},
    Location("host boot", "GPU-1", frozenset({"GPU-2"})), [(Location("host"), {"x": 1.5})],
]  # fmt: skip


@pytest.mark.parametrize("value", VALUES, ids=repr)
def test_a_value_comes_back_as_it_was(value):
    back = wire.decode(wire.encode(value))
    assert back == value
    assert type(back) is type(value)


DTYPES = [torch.uint8, torch.int64, torch.float32, torch.bfloat16, torch.bool, torch.complex64]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(), (0,), (3, 2), (2, 0, 3)])
def test_a_tensor_comes_back_as_it_was(dtype, shape):
    size = torch.Size(shape).numel()
    tensor = (torch.arange(2 * size)[::2] % 5).to(dtype).view(shape)
    back = wire.decode(wire.encode(tensor))
    assert (back.dtype, back.shape) == (dtype, torch.Size(shape))
    assert torch.equal(back, tensor)


def test_the_state_of_random_numbers_goes_on_from_where_it_was():
    torch.manual_seed(7)
    state = wire.decode(wire.encode(torch.get_rng_state()))
    want = torch.rand(3)
    torch.set_rng_state(state)
    assert torch.equal(torch.rand(3), want)


def test_not_a_number_stays_one():
    assert str(wire.decode(wire.encode(float("nan")))) == "nan"


@dataclass(frozen=True)
class Stranger:
    """Not ``sendable``."""

    name: str = "x"


@pytest.mark.parametrize("value", [Stranger(), object(), ValueError("x"), ValueError, socket.gethostname, 1j, [1j]])
def test_other_kinds_are_refused_by_name_where_they_are_sent(value):
    inner = value[0] if isinstance(value, list) else value
    with pytest.raises(TypeError, match=rf"^{type(inner).__name__} cannot be sent to other ranks"):
        wire.encode(value)


def test_bytes_of_others_are_never_run(tmp_path):
    class Bomb:
        def __reduce__(self):
            return (tmp_path.joinpath("ran").touch, ())

    with pytest.raises(ValueError, match="utf-8"):
        wire.decode(pickle.dumps(Bomb()))
    for plain in ({"Stranger": ["x"]}, {"Popen": ["true"]}):
        with pytest.raises(ValueError, match=rf"another rank sent a {next(iter(plain))}, which nothing here can read"):
            wire.decode(json.dumps(plain).encode())
    with pytest.raises(ValueError, match="a tensor of load, which is no dtype"):
        wire.decode(json.dumps({"tensor": ["load", [1], ""]}).encode())
    assert list(tmp_path.iterdir()) == []


def test_hosts_are_named_where_ranks_disagree_and_say_on_which_they_are():
    world = ThreadedWorld(2)

    def on_rank(rank):
        transport = world.transport("world", range(2), rank)
        transport.place = f"host{rank}"
        with pytest.raises(DisagreementError) as caught:
            transport.agree(code=rank)
        return str(caught.value)

    text = "ranks disagree on code: rank 0 (host0) has 0, rank 1 (host1) has 1; make it the same on all ranks"
    assert world.run(on_rank) == [text] * 2
