"""What is reported, defined once.

- ``tps``: tokens of one forward over all sequences / wall time of the forward, on all ranks together.
- ``tpot_ms``: B / TPS in ms, as the paper has it: the time in which each of the B sequences advances by one token.
  It is a throughput of prefill, not the latency of decoding (``decode_tpot_ms``, where there is a decode).
- ``token_latency_us``: 1 / TPS, the time one token costs.
- ``mode``: ``full`` is a whole forward, logits of the last token; ``prefill_only`` makes the same logits and the keys
  and values of all tokens, and leaves out what neither needs: the last layer's queries, attention, output projection
  and MLP, but for each row's last token. Its figures are never mixed with those of whole forwards.
- ``mfu``: model FLOPs of the forward / (wall time x ranks x peak). Causal attention counts once (half a square) and
  the head is left out, as the paper's figure does: 7.10 GFLOP a token at its shape and L = 10,000. For ``prefill_only``
  only the FLOPs that it needs count, 5.59 GFLOP a token there.
"""

from __future__ import annotations

from dataclasses import dataclass

from ds_ring.model_dims import ModelDims


@dataclass(frozen=True)
class Work:
    """One forward of ``batch`` sequences of ``length`` tokens.

    Attributes:
        linear_parameters: weights of all layers.
        last_layer_parameters: weights of the last layer where the mode is ``prefill_only``; None: it is ``full``.
    """

    dims: ModelDims
    linear_parameters: int
    batch: int
    length: int
    last_layer_parameters: int | None = None

    @property
    def tokens(self) -> int:
        return self.batch * self.length

    @property
    def flops_per_token(self) -> float:
        """2 a weight, and per layer 2 L H D: q k^T and p v over L/2 visible keys on average, 2 a multiply-add."""
        s = self.dims
        if self.last_layer_parameters is not None:
            return self._prefill_only_flops(self.last_layer_parameters) / self.tokens
        widths = s.num_heads * sum(head_dim for _, head_dim in s.heads_of_layers)
        return 2.0 * self.linear_parameters + 2.0 * self.length * widths

    def _prefill_only_flops(self, last_layer_parameters: int) -> float:
        """Of all tokens: the layers before the last, and the last one's K and V; of one token a row: its rest."""
        s = self.dims
        *before, (kv_heads, head_dim) = s.heads_of_layers
        kv = 2 * s.hidden_size * kv_heads * head_dim
        every = 2.0 * (self.linear_parameters - last_layer_parameters + kv)
        every += 2.0 * self.length * s.num_heads * sum(d for _, d in before)
        one = 2.0 * (last_layer_parameters - kv) + 4.0 * self.length * s.num_heads * head_dim
        return self.tokens * every + self.batch * one

    def tps(self, seconds: float) -> float:
        return self.tokens / seconds

    def tpot_ms(self, seconds: float) -> float:
        return 1e3 * self.batch / self.tps(seconds)

    def mfu(self, seconds: float, ranks: int, peak_flops: float) -> float:
        return self.flops_per_token * self.tokens / (seconds * ranks * peak_flops)
