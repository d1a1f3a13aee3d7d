"""A decoder layer's forward as a graph of operations on its submodules.

The forward runs once on proxies, over shallow copies of the layer and of its composite submodules, those that only call
other modules (MLPs). Every other submodule, attention above all, is one node. ``torch.fx``'s own tracer patches
``nn.Module`` for the whole process while it runs. This one patches nothing, so that models in other threads may run.
"""

from __future__ import annotations

import copy
from typing import Any

from torch import Tensor, fx, nn
from torch.fx.proxy import GraphAppendingTracer, Proxy


class Untraceable(Exception):
    """A forward that depends on values, or does something that a graph cannot express."""


def trace(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[fx.Graph, dict[str, nn.Module]]:
    """The graph of ``layer``'s forward when it is called like this, and the submodules that its nodes name.

    None and truth values among the arguments become constants of the graph; all else becomes a placeholder, in order.

    Raises:
        Untraceable: the forward depends on values, or uses a parameter of its own.
    """
    graph = fx.Graph()
    tracer = GraphAppendingTracer(graph)
    modules: dict[str, nn.Module] = {}
    given = [_placeholder(tracer, f"arg_{i}", value) for i, value in enumerate(args)]
    named = {name: _placeholder(tracer, f"kw_{name}", value) for name, value in kwargs.items()}
    try:
        skeleton = skeleton_of(layer, "", tracer, modules)
        out = type(layer).forward(skeleton, *given, **named)
        graph.output(_nodes(out))
    except Exception as error:  # whatever a model's code raises when it is not given tensors
        raise Untraceable(f"{type(layer).__name__}: {type(error).__name__}: {error}") from error
    if holds_tensors(graph):
        raise Untraceable(f"{type(layer).__name__}: its forward uses a parameter of its own")
    return graph, modules


def is_constant(value: object) -> bool:
    """Whether an argument becomes a constant of the graph rather than an input."""
    return value is None or isinstance(value, bool)


def _placeholder(tracer: GraphAppendingTracer, name: str, value: Any) -> Any:
    return value if is_constant(value) else tracer.create_proxy("placeholder", name, (), {})


def skeleton_of(module: nn.Module, path: str, tracer: GraphAppendingTracer, modules: dict[str, nn.Module]) -> nn.Module:
    """A copy of ``module`` whose children record their calls; composite children record those of their own children.

    Args:
        path: of ``module``, ending in a dot, or empty.
        modules: is filled with the submodules that the graph's nodes name.
    """
    skeleton = copy.copy(module)
    children: dict[str, nn.Module | None] = {}
    for name, child in module.named_children():
        child_path = f"{path}{name}"
        if _is_composite(child):
            children[name] = skeleton_of(child, f"{child_path}.", tracer, modules)
        else:
            children[name] = _Recorder(child, child_path, tracer, modules)
    skeleton._modules = {name: children.get(name) for name in module._modules}
    return skeleton


def _is_composite(module: nn.Module) -> bool:
    """Whether ``module`` has submodules, and its forward, a function of one tensor, can be traced through them."""
    if next(module.children(), None) is None or "forward" in vars(module):
        return False
    if module._forward_hooks or module._forward_pre_hooks:
        return False
    graph = fx.Graph()
    tracer = GraphAppendingTracer(graph)
    try:
        skeleton = skeleton_of(module, "", tracer, {})
        out = type(module).forward(skeleton, tracer.create_proxy("placeholder", "x", (), {}))
    except Exception:  # see ``trace``
        return False
    return isinstance(out, Proxy) and not holds_tensors(graph)


def holds_tensors(graph: fx.Graph) -> bool:
    """Whether a parameter or buffer itself is an argument of a node; the code made from a graph cannot express that."""
    found: list[Any] = []
    for node in graph.nodes:
        fx.node.map_aggregate((node.args, node.kwargs), lambda value: found.append(isinstance(value, Tensor)))
    return any(found)


class _Recorder(nn.Module):
    """Stands for a submodule: a call makes a node; all attributes are the submodule's."""

    def __init__(
        self, module: nn.Module, path: str, tracer: GraphAppendingTracer, modules: dict[str, nn.Module]
    ) -> None:
        super().__init__()
        # Not by nn.Module's registration: it is no submodule of this one.
        self.__dict__.update(_stands_for=module, _path=path, _tracer=tracer, _named=modules)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        self._named[self._path] = self._stands_for
        return self._tracer.create_proxy("call_module", self._path, args, kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_stands_for"], name)


def _nodes(value: Any) -> Any:
    if isinstance(value, Proxy):
        return value.node
    if isinstance(value, tuple):
        return tuple(_nodes(item) for item in value)
    if is_constant(value):
        return value
    raise TypeError(f"returns a {type(value).__name__}")
