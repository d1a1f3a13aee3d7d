"""What holds for all tests."""

import os
import signal

import pytest
import torch
from hypothesis import HealthCheck, settings

# Triton reads the switch when it is first imported.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# A shell's background job ignores it, and what tests start and interrupt would do so too.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# A machine may have other work: no example is too slow.
settings.register_profile("any machine", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("any machine")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Launched tests first: they take longest, and a worker without tests left takes over the last ones of others."""
    items.sort(key=lambda item: item.get_closest_marker("launch") is None)
