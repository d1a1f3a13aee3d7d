"""Rows as a comparison finds them."""

from __future__ import annotations


def row(layout, tps, *, length=1000, mode="full", error=1e-6, dtype="fp32", peak=1e12, **degrees):
    sizes = {"dp_size": 1, "pp_size": 1, "tp_size": 1, "ring_degree": 1, "ulysses_degree": 1} | degrees
    return {
        "layout": layout, "implementation": "ds_ring", "mode": mode, "gpus": 4, **sizes,
        "batch": 4, "micro_batch": 1, "length": length, "dtype": dtype,
        "device": "a device",
        "tps": tps, "tpot_ms": 4e3 / tps, "mfu": tps / peak, "peak_flops_per_gpu": peak, "step_ms": 4e6 / tps,
        "bytes_sent_per_rank": 2**20, "comm_exposed_ms": 1.5, "max_rel_error": error, "rel_error": error / 2,
    }  # fmt: skip


def timed_row(layout, length, seconds, gpus=4, **degrees):
    sizes = {"dp_size": 1, "pp_size": 1, "tp_size": 1, "ring_degree": 1, "ulysses_degree": 1} | degrees
    return {
        "layout": layout, "mode": "full", "gpus": gpus, **sizes, "length": length, "dtype": "fp16",
        "device": "a device", "step_ms": 1e3 * seconds,
    }  # fmt: skip
