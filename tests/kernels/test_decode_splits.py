"""How the decode kernel splits a cache and tiles it."""

import pytest
import torch

triton = pytest.importorskip("triton")
from ds_ring.kernels import decode_kernel  # noqa: E402


def test_splits_follow_from_shapes_alone_and_cover_the_gpu(monkeypatch):
    monkeypatch.setattr(decode_kernel, "SPLIT_UNIT", 128)
    monkeypatch.setattr(decode_kernel, "MIN_SPLIT", 256)
    for groups in (1, 8, 32, 128, 1000, 100_000):
        for n_keys in (1, 255, 4096, 32_768, 100_000, 1 << 20):
            length = decode_kernel.split_length(n_keys, groups, 132)
            splits = -(-n_keys // length)
            assert length % 128 == 0
            assert length >= 256
            assert 1 <= splits <= decode_kernel.MAX_SPLITS
            if groups >= 8 and n_keys >= 100_000:
                assert splits * groups >= 6 * 132
            if groups >= 8 * 132:
                assert splits == 1


@pytest.mark.parametrize("head_dim", [1, 64, 80, 128, 256, 300, 512])
@pytest.mark.parametrize("rows", [1, 16, 17, 64, 4096])
def test_tile_sizes_suit_the_rows_and_divide_a_split(head_dim, rows):
    found = decode_kernel.tiles(head_dim, rows, torch.float16)
    assert len(set(found)) == len(found) > 1
    assert found[0][0] == 16 if rows <= 16 else found[0][0] == 64 if rows <= 64 else found[0][0] >= 64
    for block_m, block_n, _, _ in found:
        assert 128 % block_n == 0
        assert block_n >= 32 or block_m > 16


def test_the_first_tile_that_fits_is_taken_and_the_others_are_not_tried_again(monkeypatch):
    tried = []

    def launch(*args):
        tried.append(args[-1])
        if args[-1] != 3:
            raise triton.runtime.errors.OutOfResources(300_000, 232_448, "shared memory")

    monkeypatch.setattr(decode_kernel, "INTERPRETED", False)
    monkeypatch.setattr(decode_kernel, "_launch", launch)
    monkeypatch.setattr(decode_kernel, "_too_large", set())
    monkeypatch.setattr(decode_kernel, "tiles", lambda *args: [1, 2, 3, 4])
    q = torch.zeros(1, 1, 1, 8)
    for _ in range(2):
        decode_kernel.launch(q, q, q, None, None, None, None, scale=1.0, window=None, softcap=None)
    assert tried == [1, 2, 3, 3]
    with pytest.raises(RuntimeError, match="no tile size fits"):
        decode_kernel.launch(q, q, q, None, None, None, None, scale=1.0, window=None, softcap=None, tile=2)
