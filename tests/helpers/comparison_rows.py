"""Rows as a comparison finds them."""

from __future__ import annotations

from benchmarks.layouts import compare


def run_all(comparison, logs):
    return compare.run_all(comparison, logs, lambda: None, lambda text: None)


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


def both_lengths(name):
    return [row(name, 1.0, length=500), row(name, 2.0)]


def timed(name, step_ms, *, size=1, length=1000, clock=1300.0):
    made = row(name, 4e6 / step_ms, length=length) | {"micro_batch": size, "sm_clock_mhz": clock}
    made |= {"step_samples_ms": f"{step_ms - 1:.2f} {step_ms + 1:.2f}", "step_spread": 0.0}
    made |= {"comm_exposed_ms": None, "comm_alone_ms": None}  # as where only speed is asked for
    return made | {"tps_per_gpu": made["tps"] / 4, "token_latency_us": 1e6 / made["tps"]}
