"""Where q, k and v are in a projection: the columns that every rank reads of it, and the views of what it receives."""

import pytest
import torch

from ds_ring.attention.qkv_layout import QKVLayout
from ds_ring.attention.ulysses import kv_heads_of

B, L, D = 2, 5, 4


def by_head(heads):
    """q, k and v of each head side by side, as GPT-NeoX has them."""
    whole = torch.randn(B, L, heads * 3 * D)
    return whole, whole.view(B, L, heads, 3 * D).split(D, dim=3)


def one_after_the_other(heads, kv_heads):
    whole = torch.randn(B, L, (heads + 2 * kv_heads) * D)
    parts = whole.split([heads * D, kv_heads * D, kv_heads * D], dim=2)
    return whole, tuple(part.unflatten(2, (-1, D)) for part in parts)


def by_group(heads, kv_heads):
    """Each key/value head after its query heads, as Falcon's newer models have them."""
    group = heads // kv_heads
    whole = torch.randn(B, L, kv_heads * (group + 2) * D)
    q, k, v = whole.view(B, L, kv_heads, (group + 2) * D).split([group * D, D, D], dim=3)
    return whole, (q.unflatten(3, (group, D)).flatten(2, 3), k, v)


def qkv_layout(whole, qkv):
    q, k, v = qkv
    return QKVLayout(tuple(whole.shape), k, v, q)


@pytest.mark.parametrize(
    ("made", "degree", "ranges"),
    [(by_head(8), 4, 1), (by_head(6), 2, 1), (one_after_the_other(8, 8), 4, 3), (one_after_the_other(8, 2), 4, 3)],
    ids=["by head", "by head, 3 a rank", "one after the other", "grouped"],
)
def test_a_ranks_columns_are_its_heads(made, degree, ranges):
    whole, qkv = made
    heads, kv_heads = qkv[0].shape[2], qkv[1].shape[2]
    share = heads // degree
    wanted = [(range(u * share, (u + 1) * share), kv_heads_of(u, heads, kv_heads, degree)) for u in range(degree)]
    columns = qkv_layout(whole, qkv).columns_by_rank(wanted)
    for (q_heads, kv_heads), found in zip(wanted, columns.by_rank, strict=True):
        assert len(found.ranges) == ranges
        received = [whole[..., columns].contiguous() for columns in found.ranges]
        assert sum(part.shape[2] for part in received) == (len(q_heads) + 2 * len(kv_heads)) * D
        for got, view, heads in zip(found.views(received), qkv, (q_heads, kv_heads, kv_heads), strict=True):
            assert torch.equal(got, view[:, :, list(heads)])


def test_heads_that_are_no_whole_ranges_of_columns_are_not_read():
    whole, qkv = one_after_the_other(9, 3)
    torn = [(range(0, 3), [0, 0, 1])] * 3
    assert qkv_layout(whole, qkv).columns_by_rank(torn) is None  # a head twice
    assert QKVLayout(tuple(whole.shape), qkv[1], qkv[2], None).columns_by_rank([(range(9), range(3))]) is None
    copied = qkv[0].transpose(1, 2).contiguous().transpose(1, 2)
    assert qkv_layout(whole, (copied, *qkv[1:])).columns_by_rank([(range(9), range(3))]) is None


def test_keys_and_values_are_one_view_where_their_strides_agree():
    for whole, (q, k, v) in (by_head(4), one_after_the_other(4, 2)):
        view = QKVLayout(tuple(whole.shape), k, v, q).kv_view()
        assert torch.equal(view.part(whole, (2, *k.shape)), torch.stack([k, v]))
    whole, (q, k, v) = by_head(4)
    assert QKVLayout(tuple(whole.shape), v, k, q).kv_view() is None  # values first
    assert QKVLayout(tuple(whole.shape), k[:, :, :2], v, q).kv_view() is None


def test_grouped_heads_are_one_view_too():
    whole, (q, k, v) = by_group(4, 2)
    view = QKVLayout(tuple(whole.shape), k, v, None).kv_view()
    assert torch.equal(view.part(whole, (2, *k.shape)), torch.stack([k, v]))
    assert qkv_layout(whole, (q, k, v)).columns_by_rank([(range(2), [0]), (range(2, 4), [1])]) is None  # q was copied
