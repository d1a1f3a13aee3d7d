"""Small Python values as bytes and back: what ranks tell each other.

Nothing here is pickle. Who reads a pickle runs whatever its writer wants; a port that accepts pickles would hand this
process to anybody who can reach it. Bytes of this module give plain values only, and the few classes that ``sendable``
names.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Callable, Iterable
from dataclasses import fields, is_dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

C = TypeVar("C", bound=type)

_CLASSES: dict[str, type] = {}
_CONTAINERS: dict[str, Callable[[Iterable[Any]], Any]] = {"tuple": tuple, "set": set, "frozenset": frozenset}


def sendable(cls: C) -> C:
    """Decorator: objects of this dataclass may be sent, field by field."""
    _CLASSES[cls.__name__] = cls
    return cls


def encode(value: Any) -> bytes:
    """``value`` as bytes: None, numbers, text, bytes, tensors, lists, tuples, sets, dicts and ``sendable`` classes.

    Raises:
        TypeError: anything else.
    """
    return json.dumps(_plain(value), separators=(",", ":")).encode()


def decode(data: bytes) -> Any:
    """The value that ``encode`` was given; tensors are on the CPU.

    Raises:
        ValueError: bytes that ``encode`` did not make.
    """
    return _value(json.loads(data))


def _plain(value: Any) -> Any:
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, list):
        return [_plain(item) for item in value]
    if type(value) in (tuple, set, frozenset):
        return {type(value).__name__: [_plain(item) for item in value]}
    if isinstance(value, dict):
        return {"dict": [[_plain(key), _plain(item)] for key, item in value.items()]}
    if isinstance(value, bytes):
        return {"bytes": base64.b64encode(value).decode()}
    if isinstance(value, Tensor):
        flat = value.detach().cpu().reshape(-1)
        data = flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b""
        return {"tensor": [str(value.dtype).removeprefix("torch."), list(value.shape), base64.b64encode(data).decode()]}
    name = type(value).__name__
    if _CLASSES.get(name) is type(value) and is_dataclass(value):
        return {name: [_plain(getattr(value, field.name)) for field in fields(value)]}
    raise TypeError(f"{type(value).__name__} cannot be sent to other ranks; see ds_ring/transport/wire.py")


def _value(plain: Any) -> Any:
    if isinstance(plain, list):
        return [_value(item) for item in plain]
    if not isinstance(plain, dict):
        return plain
    ((name, content),) = plain.items()
    if name == "dict":
        return {_value(key): _value(item) for key, item in content}
    if name == "bytes":
        return base64.b64decode(content)
    if name == "tensor":
        return _tensor(*content)
    if name in _CONTAINERS:
        return _CONTAINERS[name](_value(item) for item in content)
    if name not in _CLASSES:
        raise ValueError(f"another rank sent a {name}, which nothing here can read")
    return _CLASSES[name](*(_value(item) for item in content))


def _tensor(dtype: str, shape: list[int], data: str) -> Tensor:
    kind = getattr(torch, dtype)
    if not isinstance(kind, torch.dtype):
        raise ValueError(f"another rank sent a tensor of {dtype}, which is no dtype")
    read = bytearray(base64.b64decode(data))
    flat = torch.frombuffer(read, dtype=torch.uint8).view(kind) if read else torch.empty(0, dtype=kind)
    return flat.view(shape)
