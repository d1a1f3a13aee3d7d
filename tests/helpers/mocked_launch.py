"""Mocked launches: every rank loads the checkpoint and builds its engine as a launched one does."""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
from torch import Tensor
from transformers import PreTrainedModel

from ds_ring import api
from tests.helpers.limits import HANG_S
from tests.helpers.mocked_world import one_process
from tests.helpers.process_group_world import ProcessGroupWorld


def mocked_launch(work: Callable[[int], Tensor], size: int, monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """``work(rank)`` on all ranks of a mocked launch. Building a model patches torch.nn for the whole process: ranks do
    so one after the other, and none goes on before all have."""
    one_at_a_time, all_done = threading.Lock(), threading.Barrier(size, timeout=HANG_S)

    def in_turn(build: Callable[..., PreTrainedModel | None], *args: Any) -> PreTrainedModel | None:
        with one_at_a_time:
            model = build(*args)
        all_done.wait()
        return model

    for name in ("dry_run", "load_model", "load_stage"):
        monkeypatch.setattr(api, name, partial(in_turn, getattr(api, name)))
    for key, value in {"WORLD_SIZE": str(size), "RANK": "0", "DS_ACCELERATOR": "cpu"}.items():
        monkeypatch.setenv(key, value)
    with one_process():
        return ProcessGroupWorld(size).run(work)
