"""A decoder layer's forward as a graph of operations on its submodules.

The forward runs once on proxies, over shallow copies of the layer and of those submodules that are nothing but other
modules put together (MLPs); every other submodule, attention above all, is one node. ``torch.fx``'s own tracer patches
``nn.Module`` for the whole process while it runs; this patches nothing, so that models in other threads may run.
"""

from __future__ import annotations

import copy
from typing import Any

from torch import Tensor, fx, nn
from torch.fx.proxy import GraphAppendingTracer, Proxy


class Untraceable(Exception):
    """A forward that depends on values, or does what a graph cannot say."""


def trace(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[fx.Graph, dict[str, nn.Module]]:
    """The graph of ``layer``'s forward when it is called like this, and the submodules that its nodes name.

    None and truth values among the arguments are part of the graph; all else becomes a placeholder, in order.

    Raises:
        Untraceable
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
    """Whether an argument is part of the graph rather than given to it."""
    return value is None or isinstance(value, bool)


def _placeholder(tracer: GraphAppendingTracer, name: str, value: Any) -> Any:
    return value if is_constant(value) else tracer.create_proxy("placeholder", name, (), {})


def skeleton_of(module: nn.Module, path: str, tracer: GraphAppendingTracer, modules: dict[str, nn.Module]) -> nn.Module:
    """A copy of ``module`` whose children record their calls; composite ones do so through their own children."""
    skeleton = copy.copy(module)
    children: dict[str, nn.Module | None] = {}
    for name, child in module.named_children():
        at = f"{path}{name}"
        if _is_composite(child):
            children[name] = skeleton_of(child, f"{at}.", tracer, modules)
        else:
            children[name] = _Recorder(child, at, tracer, modules)
    skeleton._modules = {name: children.get(name) for name in module._modules}
    return skeleton


def _is_composite(module: nn.Module) -> bool:
    """Whether ``module`` has submodules and its forward, a function of one tensor, can be traced through them."""
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
    """Whether a parameter or buffer itself is an argument of some node: the code that is made of it cannot say that."""
    found: list[Any] = []
    for node in graph.nodes:
        fx.node.map_aggregate((node.args, node.kwargs), lambda value: found.append(isinstance(value, Tensor)))
    return any(found)


class _Recorder(nn.Module):
    """Stands for a submodule: calling it makes a node; whatever else is asked of it, the submodule answers."""

    def __init__(
        self, module: nn.Module, path: str, tracer: GraphAppendingTracer, modules: dict[str, nn.Module]
    ) -> None:
        super().__init__()
        # Past nn.Module's registration: this is no submodule.
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
