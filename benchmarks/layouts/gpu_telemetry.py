"""What GPUs say of themselves while they work: clock, power, temperature, energy, and whether their links are awake."""

from __future__ import annotations

import statistics
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

_SM_CLOCK, _OF_THE_GPU = 1, 0
_LINK_STATE, _LINK_THRESHOLD, _POWER_NOW, _LINK_THRESHOLD_UNITS, _50_US = 167, 168, 186, 224, 1
"""Of nvml.h; older bindings do not name all of them."""


@contextmanager
def watched_gpu(device: torch.device, period_s: float = 0.1) -> Iterator[dict[str, float]]:
    """Samples the GPU while the block runs, which begins when the GPU has done what it was given before. The dict is
    filled at the end: ``sm_clock_mhz``, ``power_w`` and ``temperature_c``, medians, ``energy_j``, all of the block's,
    and ``link_awake``, the share of samples in which its first NVLink was; it stays empty on a CPU, and lacks what the
    driver does not tell."""
    found: dict[str, float] = {}
    handle = _handle(device) if device.type == "cuda" else None
    if handle is None:
        yield found
        return
    samples: dict[str, list[float]] = {name: [] for name in _SENSORS}
    stop = threading.Event()

    def sample() -> None:
        while not stop.wait(period_s):
            for name, sensor in _SENSORS.items():
                if (value := sensor(handle)) is not None:
                    samples[name].append(value)

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
        for name, values in samples.items():
            if values:
                found[name] = statistics.mean(values) if name == "link_awake" else statistics.median(values)
        if before is not None and after is not None:
            found["energy_j"] = after - before


def link_sleeps_after_ms(device: torch.device) -> float | None:
    """How long an NVLink is idle before it goes to sleep; None where the driver does not tell."""
    handle = _handle(device)
    threshold = _field(handle, _LINK_THRESHOLD)
    unit = 0.05 if _field(handle, _LINK_THRESHOLD_UNITS) == _50_US else 0.1
    return None if threshold is None else threshold * unit


def _handle(device: torch.device) -> Any:
    """None where there is no driver to ask, or it does not know the device."""
    import pynvml

    try:
        pynvml.nvmlInit()
        return pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties(device).uuid}")
    except pynvml.NVMLError:
        return None


def _asked(name: str, *arguments: Any) -> Any:
    """What NVML answers; None where it does not."""
    import pynvml

    try:
        return getattr(pynvml, name)(*arguments)
    except pynvml.NVMLError:
        return None


def _field(handle: Any, number: int) -> int | None:
    """A whole number that the driver has under ``number``, of the first link where each has one."""
    fields = _asked("nvmlDeviceGetFieldValues", handle, [(number, 0)])
    return int(fields[0].value.uiVal) if fields and fields[0].nvmlReturn == 0 else None


def _energy_j(handle: Any) -> float | None:
    """Used since the driver was loaded."""
    millijoules = _asked("nvmlDeviceGetTotalEnergyConsumption", handle)
    return None if millijoules is None else millijoules / 1e3


def _power_w(handle: Any) -> float | None:
    """The power now, where the driver tells it: the plain query is an average over the last second."""
    milliwatts = _field(handle, _POWER_NOW) or _asked("nvmlDeviceGetPowerUsage", handle)
    return None if milliwatts is None else milliwatts / 1e3


def _link_awake(handle: Any) -> float | None:
    state = _field(handle, _LINK_STATE)
    return None if state is None else float(state == 0)


_SENSORS: dict[str, Callable[[Any], float | None]] = {
    "sm_clock_mhz": lambda handle: _asked("nvmlDeviceGetClockInfo", handle, _SM_CLOCK),
    "power_w": _power_w,
    "temperature_c": lambda handle: _asked("nvmlDeviceGetTemperature", handle, _OF_THE_GPU),
    "link_awake": _link_awake,
}
