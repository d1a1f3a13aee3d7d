"""Figures with the unit that shows them."""

from __future__ import annotations

import pytest

from ds_ring.utils.numbers import milliseconds, rate, sent, size


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (size(0), "0.0 KiB"), (size(1536), "1.5 KiB"), (size(5.25 * 2**20), "5.2 MiB"), (size(2**41), "2,048.0 GiB"),
        (sent(0), "0 B"), (sent(512), "512 B"), (sent(294_912), "295 kB"), (sent(4_423_680), "4.42 MB"),
        (sent(5.2e12), "5,200 GB"),
        (milliseconds(0), "0 ms"), (milliseconds(3.29e-5), "0.0329 ms"), (milliseconds(1.9023), "1,902 ms"),
        (rate(0.03125), "0.0312 tok/s"), (rate(1_263_412), "1,263,412 tok/s"),
    ],
)  # fmt: skip
def test_a_figure_is_never_shown_as_nothing(text, words):
    assert text == words
