"""What is reported, defined once.

- ``tps``: tokens of one forward over all sequences / wall time of the forward, on all ranks together.
- ``tpot_ms``: B / TPS in ms, as the paper has it: the time in which each of the B sequences advances by one token.
  It is a throughput of prefill, not the latency of decoding (``decode_tpot_ms``, where there is a decode).
- ``token_latency_us``: 1 / TPS, the time one token costs.
- ``mfu``: model FLOPs of the forward / (wall time x ranks x peak). Causal attention counts once (half a square) and
  the head is left out, as the paper's figure does: 7.10 GFLOP a token at its shape and L = 10,000.
"""

from __future__ import annotations

from dataclasses import dataclass

from ds_ring.checks import ModelShape


@dataclass(frozen=True)
class Work:
    """One forward of ``batch`` sequences of ``length`` tokens; ``linear_parameters``: weights of all layers."""

    shape: ModelShape
    linear_parameters: int
    batch: int
    length: int

    @property
    def tokens(self) -> int:
        return self.batch * self.length

    @property
    def flops_per_token(self) -> float:
        """2 a weight, and per layer 2 L H D: q k^T and p v over L/2 visible keys on average, 2 a multiply-add."""
        s = self.shape
        return 2.0 * self.linear_parameters + 2.0 * s.num_layers * self.length * s.num_heads * s.head_dim

    def tps(self, seconds: float) -> float:
        return self.tokens / seconds

    def tpot_ms(self, seconds: float) -> float:
        return 1e3 * self.batch / self.tps(seconds)

    def mfu(self, seconds: float, ranks: int, peak_flops: float) -> float:
        return self.flops_per_token * self.tokens / (seconds * ranks * peak_flops)
