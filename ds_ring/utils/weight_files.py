"""Which files hold a checkpoint's weights: the one answer that loaders, the fingerprint, the dtype and doctor share.

The order is that of transformers' ``from_pretrained`` with ``use_safetensors=True``: ``transformers_weights`` of
config.json, then ``model.safetensors``, then ``model.safetensors.index.json``. transformers takes the first without a
look at the others, and other tools take another one, so a folder that holds two different sets is refused. Names with a
variant (``model.fp16.safetensors``) are never taken unasked, as in transformers.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from ds_ring.errors import CheckpointError
from ds_ring.utils.file_kind import not_a_file
from ds_ring.utils.lfs import is_pointer, refuse_pointer

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
EXPLICIT = "transformers_weights"
ADAPTER = "adapter_config.json"
DISTRIBUTED = re.compile(r"shard-\d{5}-model-\d{5}-of-\d{5}\.safetensors")
"""Names in a distributed checkpoint, which transformers 5.23 takes before all others."""


def weight_files(directory: Path, fields: dict[str, Any]) -> list[Path]:
    """The safetensors files of the checkpoint whose config.json has ``fields``, in the order in which they are read.

    Raises:
        CheckpointError: none (pickled weights are never read), a missing shard, an index or a name that points outside
            the directory, or more in the directory than one set of weights.
    """
    chosen = single_or_index(directory, fields)
    return _indexed_shards(chosen) if chosen.suffix == ".json" else [chosen]


def single_or_index(directory: Path, fields: dict[str, Any]) -> Path:
    """The file that transformers begins with: of all weights, or the index of several. Errors as of ``weight_files``,
    but for those of an index."""
    _refuse_other_forms(directory)
    if fields.get(EXPLICIT) is not None:
        return _named_file(directory, fields[EXPLICIT])
    single, index = directory / SINGLE, directory / INDEX
    if single.is_file() and index.is_file():
        others = sorted(set(weight_map(index).values()) - {SINGLE})
        if others:
            raise CheckpointError(
                f"{directory} holds two sets of weights, {SINGLE} and {len(others)} file(s) that {INDEX} names "
                f"({others[0]} first); remove one of them, or name the right one in config.json as {EXPLICIT}"
            )
    if single.is_file():
        return single
    if index.is_file():
        return index
    _refuse_no_file(single, index)
    raise CheckpointError(_without_weights(directory))


def weight_map(index: Path) -> dict[str, str]:
    """The name of each tensor's file."""
    return dict(_read_index(index)["weight_map"])


def metadata_of(index: Path) -> dict[str, Any]:
    """What an index says of its tensors as a whole."""
    found = _read_index(index).get("metadata")
    return found if isinstance(found, dict) else {}


def tensor_names(file: Path) -> list[str]:
    """The tensors of a safetensors file. Raises CheckpointError where it is none, or is cut short."""
    try:
        with safe_open(file, framework="np") as opened:
            return list(opened.keys())
    except (SafetensorError, OSError) as error:
        if is_pointer(file):
            refuse_pointer(file)
        raise CheckpointError(f"{file} is damaged or truncated: {error}") from None


def _refuse_other_forms(directory: Path) -> None:
    if (directory / ADAPTER).is_file():
        raise CheckpointError(
            f"{directory} holds an adapter ({ADAPTER}), which is not applied here; merge it into the model with "
            f"merge_and_unload() and save that, or move it elsewhere"
        )
    shards = sorted(file.name for file in directory.iterdir() if DISTRIBUTED.fullmatch(file.name))
    if shards:
        raise CheckpointError(
            f"{directory} is a distributed checkpoint ({shards[0]}); save it with model.save_pretrained(…), as {SINGLE}"
        )


def _refuse_no_file(*files: Path) -> None:
    for file in files:
        if (why := not_a_file(file)) is not None:
            raise CheckpointError(f"{file} {why}; put the weights there, or take it away")


def _named_file(directory: Path, name: Any) -> Path:
    if not isinstance(name, str) or not name.endswith((".safetensors", ".safetensors.index.json")):
        raise CheckpointError(
            f"{directory}/config.json: {EXPLICIT}={name!r} must name a *.safetensors or *.safetensors.index.json file"
        )
    if Path(name).name != name:
        raise CheckpointError(f"{directory}/config.json: {EXPLICIT}={name!r} must be a file of the directory itself")
    _refuse_no_file(directory / name)
    if not (directory / name).is_file():
        raise CheckpointError(f"{directory} lacks the file that its config.json names ({EXPLICIT}={name!r})")
    return directory / name


def _indexed_shards(index: Path) -> list[Path]:
    """The shards in transformers' order. It takes every tensor of each, and of two with one name the later: an index
    that names the earlier is of another save."""
    named = weight_map(index)
    shards = sorted(set(named.values()))
    for name in shards:
        if Path(name).name != name or name in ("", ".."):
            raise CheckpointError(f"{index} points outside its directory: {name!r}")
        _refuse_no_file(index.parent / name)
        if not (index.parent / name).is_file():
            raise CheckpointError(f"{index.parent} lacks the shard {name} that its index names")
    held: dict[str, str] = {}
    for shard in shards:
        for tensor in tensor_names(index.parent / shard):
            if tensor in held and named.get(tensor) != shard:
                raise CheckpointError(
                    f"{index.parent} has {tensor} in {held[tensor]} and in {shard}: its files are of two saves; remove "
                    f"those of one"
                )
            held[tensor] = shard
    return [index.parent / name for name in shards]


def _read_index(index: Path) -> dict[str, Any]:
    refuse_pointer(index)
    try:
        found = json.loads(index.read_text(encoding="utf-8"))
        if not all(isinstance(name, str) for name in found["weight_map"].values()) or not found["weight_map"]:
            raise TypeError("weight_map must name a file for each tensor")
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
        raise CheckpointError(f"{index} is not a safetensors index: {error!r}") from None
    return dict(found)


def _without_weights(directory: Path) -> str:
    advice = f"save it with model.save_pretrained(…), as {SINGLE}"
    others = sorted(file.name for file in directory.glob("*.safetensors"))
    if others:
        return (
            f"{directory} has neither {SINGLE} nor {INDEX}, but {others[0]}; if these are the weights, name the file "
            f"in config.json as {EXPLICIT}"
        )
    pickled = sorted(p.name for p in directory.glob("*.bin")) + sorted(p.name for p in directory.glob("*.pt"))
    what = f"only pickled weights ({pickled[0]}), which can run code" if pickled else "no weights"
    return f"{directory} has {what}; {advice}"
