"""Tile sizes of our Triton attention kernel: which are tried for a call, and when."""

import pytest
import torch

from ds_ring.kernels import triton_attention_kernel, triton_attention_tiles
from tests.helpers.triton_interpreter import INTERPRETED

pytestmark = INTERPRETED


def suitable(*, head_dim=128, dtype=torch.float16, aligned=True, rows=8192, capability=(9, 0)):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.version, "cuda", "13.0")
        patch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        arguments = {"q": torch.zeros(1, dtype=dtype), "queries_bucket": rows}
        return triton_attention_tiles.suitable_configs(None, arguments, BLOCK_D=head_dim, ALIGNED=aligned)


@pytest.mark.parametrize("head_dim", [16, 32, 64, 128, 256, 512])
def test_there_are_some_for_every_head_size(head_dim):
    found = suitable(head_dim=head_dim)
    assert {config.kwargs["USE_TMA"] for config in found} == {True, False}
    assert len(set(found)) == len(found)
    assert all(config in triton_attention_kernel.tuned_forward.configs for config in found)


def test_tma_is_for_aligned_tensors_on_hopper_and_later():
    for found in (
        suitable(aligned=False),
        suitable(capability=(8, 0)),
        suitable(dtype=torch.float32),
    ):
        assert found
        assert not any(config.kwargs["USE_TMA"] for config in found)


def test_few_queries_take_small_tiles():
    assert {config.kwargs["BLOCK_M"] for config in suitable(rows=16)} == {16, 64}


def test_lengths_share_tile_sizes_by_powers_of_two():
    buckets = [triton_attention_tiles.bucket(n) for n in (1, 16, 17, 1000, 1024, 8193, 1 << 20)]
    assert buckets == [16, 16, 32, 1024, 1024, 8192, 8192]
    assert triton_attention_tiles.bucket(1 << 20, 64) == 64


def test_a_capture_without_a_tile_size_says_so(monkeypatch):
    class OnGpu:
        is_cuda = True

    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(RuntimeError, match="call it once before"):
        triton_attention_tiles.suitable_configs(None, {"q": OnGpu()}, BLOCK_D=64, ALIGNED=True)


@pytest.mark.parametrize(
    ("lengths", "ahead", "behind", "cut"),
    [
        ((20000, 30000), 10000, None, (8192, 8192, 0, None)),
        ((20000, 30000), 10000, 9000, (8192, 8192, 0, -1000)),
        ((100, 30000), 29900, None, (100, 8192, 8092, None)),
        ((20000, 20000), None, -30000, (8192, 8192, None, -8191)),
        ((20000, 20000), None, None, (8192, 8192, None, None)),
    ],
)
def test_long_blocks_are_tried_in_part_and_once(monkeypatch, lengths, ahead, behind, cut):
    tried = []
    monkeypatch.setattr(triton_attention_kernel, "_tried", set())
    monkeypatch.setattr(triton_attention_kernel, "_launch", lambda *args: tried.append(args))
    q, k, lse = torch.empty(1, lengths[0], 1, 1), torch.empty(1, lengths[1], 1, 1), torch.empty(1, 1, lengths[0])
    for _ in range(2):
        triton_attention_kernel._choose_for_long(q, k, k, q, lse, (q, lse), 1.0, None, ahead, behind)
    ((q, k, v, out, lse, previous, *_, ahead, behind),) = tried
    assert (q.shape[1], k.shape[1], ahead, behind) == cut
    assert v.shape == k.shape
    assert out.shape == previous[0].shape == q.shape
    assert lse.shape == previous[1].shape == (1, 1, q.shape[1])


def test_short_blocks_are_tried_as_they_are(monkeypatch):
    monkeypatch.setattr(triton_attention_kernel, "_launch", lambda *args: pytest.fail("tried in part"))
    q, lse = torch.empty(1, 8192, 1, 1), torch.empty(1, 1, 8192)
    triton_attention_kernel._choose_for_long(q, q, q, q, lse, None, 1.0, None, 0, None)
