"""What each rank does to make q, k and v, as a list of events."""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import pytest

from ds_ring.attention.kv_exchange import KVExchange
from ds_ring.hf.linear import Linear
from ds_ring.kernels import elementwise
from ds_ring.transport.copy_engine import CopyEngineTransport


@pytest.fixture
def seen(monkeypatch) -> dict[int, list[tuple[Any, ...]]]:
    """What the thread of each rank did, in order: (what, addresses in memory)."""
    events: dict[int, list[tuple[Any, ...]]] = defaultdict(list)

    def watch(owner: Any, name: str, event: Callable[..., tuple[Any, ...]]) -> None:
        function = getattr(owner, name)

        def watched(*args: Any, **kwargs: Any) -> Any:
            result = function(*args, **kwargs)
            events[threading.get_ident()].append(event(*args))
            return result

        monkeypatch.setattr(owner, name, watched)

    watch(elementwise, "put", lambda x, out, cos_sin=None: ("rotate" if cos_sin else "copy", out.data_ptr()))
    watch(elementwise, "rotate_", lambda x, cos_sin: ("rotate in place", x.data_ptr()))
    watch(Linear, "into", lambda linear, x, out: ("project", out.data_ptr()))
    watch(KVExchange, "__init__", lambda self, *_: ("open", self.own_2BLKD[0].data_ptr(), self.own_2BLKD[1].data_ptr()))
    watch(KVExchange, "start", lambda self: ("start",))
    watch(KVExchange, "write", lambda self, *_: ("write",))
    watch(CopyEngineTransport, "send_buffer", lambda self, *_: ("send_buffer",))
    return events
