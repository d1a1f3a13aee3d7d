"""Telemetry of a working GPU by NVML: clock, power, temperature, energy, and whether its links are awake."""

from __future__ import annotations

import statistics
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

_SM_CLOCK, _OF_THE_GPU = 1, 0
_LINK_STATE, _LINK_THRESHOLD, _POWER_NOW, _LINK_THRESHOLD_UNITS, _50_US = 167, 168, 186, 224, 1
"""Constants of nvml.h. Older Python bindings lack names for some."""


@contextmanager
def watched_gpu(device: torch.device, period_s: float = 0.1) -> Iterator[dict[str, float]]:
    """Sample the GPU every ``period_s`` seconds while the block runs. Waits for earlier work on the GPU first.

    The dict is filled when the block ends. ``sm_clock_mhz``, ``power_w`` and ``temperature_c`` are medians,
    ``energy_j`` is the energy of the block, and ``link_awake`` the share of samples in which the first NVLink was
    awake. On a CPU the dict stays empty. Figures that the driver does not know are left out.
    """
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
    """Idle time after which an NVLink goes to sleep; None where the driver does not know it."""
    handle = _handle(device)
    threshold = _field(handle, _LINK_THRESHOLD)
    unit = 0.05 if _field(handle, _LINK_THRESHOLD_UNITS) == _50_US else 0.1
    return None if threshold is None else threshold * unit


def _handle(device: torch.device) -> Any:
    """NVML's handle; None where there is no driver, or it does not know the device."""
    import pynvml

    try:
        pynvml.nvmlInit()
        return pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties(device).uuid}")
    except pynvml.NVMLError:
        return None


def _asked(name: str, *arguments: Any) -> Any:
    """NVML's answer; None where it gives an error."""
    import pynvml

    try:
        return getattr(pynvml, name)(*arguments)
    except pynvml.NVMLError:
        return None


def _field(handle: Any, number: int) -> int | None:
    """The integer field ``number`` of the driver, of the first link where every link has one."""
    fields = _asked("nvmlDeviceGetFieldValues", handle, [(number, 0)])
    return int(fields[0].value.uiVal) if fields and fields[0].nvmlReturn == 0 else None


def _energy_j(handle: Any) -> float | None:
    """Energy used since the driver was loaded."""
    millijoules = _asked("nvmlDeviceGetTotalEnergyConsumption", handle)
    return None if millijoules is None else millijoules / 1e3


def _power_w(handle: Any) -> float | None:
    """The power now, where the driver knows it. The usual query gives an average over the last second."""
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
