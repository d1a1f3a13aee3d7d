"""A decode kernel whose splits are as short as the tests' caches are."""

import pytest

from ds_ring.attention.backends import eager


@pytest.fixture(scope="module")
def small_steps():
    """Splits, scans and groups of scores so small that short sequences have several."""
    decode_kernel = pytest.importorskip("ds_ring.kernels.decode_kernel")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(decode_kernel, "SPLIT_UNIT", 16)
        patch.setattr(decode_kernel, "MIN_SPLIT", 32)
        patch.setattr(eager, "SCORES_LIMIT", 300)
        yield
