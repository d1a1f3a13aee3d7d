"""Telemetry of GPUs: figures that the driver gives, and those that it does not."""

from __future__ import annotations

import sys
import threading
import types
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch

from benchmarks.layouts import gpu_telemetry
from tests.helpers.limits import HANG_S

CUDA = torch.device("cuda")


class Refused(Exception):
    pass


def refuse(*_: Any) -> Any:
    raise Refused


@pytest.fixture
def driver(monkeypatch):
    """An NVML of the given answers, on a GPU that is never busy; whatever else is asked is refused."""

    def install(fields: dict[int, int], **answers: Any) -> None:
        def values(_: object, asked: list[tuple[int, int]]) -> list[types.SimpleNamespace]:
            ((number, _),) = asked
            value = types.SimpleNamespace(uiVal=fields.get(number))
            return [types.SimpleNamespace(nvmlReturn=0 if number in fields else 3, value=value)]

        names = ("ClockInfo", "Temperature", "PowerUsage", "TotalEnergyConsumption")
        calls = {f"nvmlDeviceGet{name}": answers.get(name, refuse) for name in names}
        handle = {"nvmlInit": lambda: None, "nvmlDeviceGetHandleByUUID": answers.get("handle", lambda uuid: uuid)}
        fake = types.SimpleNamespace(NVMLError=Refused, nvmlDeviceGetFieldValues=values, **handle, **calls)
        monkeypatch.setitem(sys.modules, "pynvml", fake)

    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: types.SimpleNamespace(uuid="1"))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda _: None)
    return install


def watched(monkeypatch, samples: int = 3) -> dict[str, float]:
    """What is found while so many samples are taken."""
    taken, enough = [], threading.Event()

    def last_sensor(sensor: Callable[[Any], float | None], handle: Any) -> float | None:
        value = sensor(handle)
        taken.append(value)
        if len(taken) == samples:
            enough.set()
        return value

    sensors = gpu_telemetry._SENSORS
    name, sensor = list(sensors.items())[-1]
    monkeypatch.setattr(gpu_telemetry, "_SENSORS", sensors | {name: partial(last_sensor, sensor)})
    with gpu_telemetry.watched_gpu(CUDA, period_s=1e-3) as found:
        assert samples == 0 or enough.wait(HANG_S)
    return found


def test_all_figures_of_a_driver(driver, monkeypatch):
    energies = iter((1000, 4500))
    driver(
        {186: 650_000, 167: 1}, ClockInfo=lambda *_: 1300, Temperature=lambda *_: 61,
        TotalEnergyConsumption=lambda _: next(energies),
    )  # fmt: skip
    assert watched(monkeypatch) == {
        "sm_clock_mhz": 1300, "power_w": 650.0, "temperature_c": 61, "link_awake": 0.0, "energy_j": 3.5,
    }  # fmt: skip


def test_power_is_the_average_where_the_driver_does_not_give_that_of_the_moment(driver, monkeypatch):
    driver({}, PowerUsage=lambda _: 500_000)
    assert watched(monkeypatch) == {"power_w": 500.0}


def test_nothing_is_found_where_the_driver_does_not_know_the_device(driver, monkeypatch):
    driver({186: 650_000}, handle=refuse)
    assert watched(monkeypatch, samples=0) == {}


def test_an_error_in_the_block_is_that_of_the_block(driver):
    driver({})
    with pytest.raises(KeyError), gpu_telemetry.watched_gpu(CUDA):
        raise KeyError


@pytest.mark.parametrize(("fields", "ms"), [({168: 500}, 50.0), ({168: 500, 224: 1}, 25.0), ({}, None)])
def test_when_links_go_to_sleep(driver, fields, ms):
    driver(fields)
    assert gpu_telemetry.link_sleeps_after_ms(CUDA) == ms
