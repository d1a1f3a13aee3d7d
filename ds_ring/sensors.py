"""What GPUs say of themselves while they work: clock, power, temperature, energy, and whether their links are awake."""

from __future__ import annotations

import statistics
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

_LINK_THRESHOLD_UNITS, _50_US = 224, 1
"""Of nvml.h; older bindings do not name them."""


@contextmanager
def watched_gpu(device: torch.device, period_s: float = 0.1) -> Iterator[dict[str, float]]:
    """Samples the GPU while the block runs, which begins when the GPU has done what it was given before. The dict is
    filled at the end: ``sm_clock_mhz``, ``power_w`` and ``temperature_c``, medians, ``energy_j``, all of the block's,
    and ``link_awake``, the share of samples in which its first NVLink was; it stays empty on a CPU, and lacks what the
    driver does not tell."""
    found: dict[str, float] = {}
    if device.type != "cuda":
        yield found
        return
    import pynvml

    handle = _handle(device)
    clocks: list[float] = []
    watts: list[float] = []
    degrees: list[float] = []
    awake: list[bool] = []
    stop = threading.Event()

    def sample() -> None:
        while not stop.wait(period_s):
            clocks.append(pynvml.nvmlDeviceGetClockInfo(handle, pynvml.NVML_CLOCK_SM))
            watts.append(_power_w(handle))
            degrees.append(pynvml.nvmlDeviceGetTemperature(handle, pynvml.NVML_TEMPERATURE_GPU))
            state = _field(handle, pynvml.NVML_FI_DEV_NVLINK_GET_POWER_STATE)
            if state is not None:
                awake.append(state == pynvml.NVML_NVLINK_POWER_STATE_HIGH_SPEED)

    thread = threading.Thread(target=sample, daemon=True)
    torch.cuda.synchronize(device)
    thread.start()
    before = _energy_j(handle)
    try:
        yield found
    finally:
        after = _energy_j(handle)
        stop.set()
        thread.join()
        if clocks:
            found |= {"sm_clock_mhz": statistics.median(clocks), "power_w": statistics.median(watts)}
            found |= {"temperature_c": statistics.median(degrees)}
        if awake:
            found["link_awake"] = statistics.mean(awake)
        if before is not None and after is not None:
            found["energy_j"] = after - before


def link_sleeps_after_ms(device: torch.device) -> float | None:
    """How long an NVLink is idle before it goes to sleep; None where the driver does not tell."""
    import pynvml

    handle = _handle(device)
    threshold = _field(handle, pynvml.NVML_FI_DEV_NVLINK_GET_POWER_THRESHOLD)
    unit = 0.05 if _field(handle, _LINK_THRESHOLD_UNITS) == _50_US else 0.1
    return None if threshold is None else threshold * unit


def _handle(device: torch.device) -> Any:
    import pynvml

    pynvml.nvmlInit()
    return pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties(device).uuid}")


def _energy_j(handle: Any) -> float | None:
    """Used since the driver was loaded; None where the GPU does not count it."""
    import pynvml

    try:
        return float(pynvml.nvmlDeviceGetTotalEnergyConsumption(handle)) / 1e3
    except pynvml.NVMLError:
        return None


def _power_w(handle: Any) -> float:
    """The power now, where the driver tells it: the plain query is an average over the last second."""
    import pynvml

    now = _field(handle, pynvml.NVML_FI_DEV_POWER_INSTANT)
    return float(now or pynvml.nvmlDeviceGetPowerUsage(handle)) / 1e3


def _field(handle: Any, number: int) -> int | None:
    """A whole number that the driver has under ``number``, of the first link where each has one; None: it has none."""
    import pynvml

    try:
        (field,) = pynvml.nvmlDeviceGetFieldValues(handle, [(number, 0)])
    except pynvml.NVMLError:
        return None
    return int(field.value.uiVal) if field.nvmlReturn == pynvml.NVML_SUCCESS else None
