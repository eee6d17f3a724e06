"""A submodule whose forward is a graph of calls instead of the code of its class."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from functools import cache
from typing import Any, cast

from torch import Tensor, fx, nn
from torch.fx.graph_module import reduce_graph_module

__all__ = ["CONSTANT", "GraphBody"]

#: Prefix of the names of buffers and modules that hold constants of a graph.
CONSTANT = "_constant"


class GraphBody(fx.GraphModule):
    """The modules, tensors, attributes and hooks of ``module`` with ``graph`` for a forward.

    Unlike a plain ``GraphModule`` it keeps things that the graph does not name, also through ``copy.deepcopy`` and
    ``pickle``: names in the state dict, children without calls, attributes that other code reads, hooks.

    Args:
        module: the original submodule, or a narrowed one. Its children and tensors are shared, not copied.
        graph: calls children of ``module`` by their names, and ATen operators.
        constants: name -> tensor that the graph reads, kept as a buffer that is not saved, or module that it calls.
    """

    def __init__(
        self, module: nn.Module, graph: fx.Graph, constants: Mapping[str, Tensor | nn.Module] | None = None
    ) -> None:
        module = _bare(vars(module))
        read = {str(node.target) for node in graph.nodes if node.op in ("get_attr", "call_module")}
        for name in [n for n in (*module._buffers, *module._modules) if n.startswith(CONSTANT) and n not in read]:
            delattr(module, name)  # of an earlier graph
        for name, value in (constants or {}).items():
            if isinstance(value, nn.Module):
                module.add_module(name, value)
            else:
                module.register_buffer(name, value, persistent=False)
        super().__init__(module, graph, "GraphBody")
        for key, value in vars(module).items():
            if key not in _graph_attributes() and key != "forward":  # one that the original put on itself
                self.__dict__[key] = value

    @property
    def constants(self) -> dict[str, Tensor | nn.Module]:
        """Constants of the graph."""
        own: list[tuple[str, Tensor | nn.Module]] = [*self.named_buffers(recurse=False), *self.named_children()]
        return {name: value for name, value in own if name.startswith(CONSTANT)}

    def __deepcopy__(self, memo: dict[int, Any]) -> GraphBody:
        copied = GraphBody(_bare(copy.deepcopy(_without_graph(vars(self)), memo)), copy.deepcopy(self.graph))
        memo[id(self)] = copied
        return copied

    def __reduce__(self) -> tuple[Any, ...]:
        _, arguments = super().__reduce__()
        return _restore, arguments


def _restore(attributes: dict[str, Any], imports: str) -> GraphBody:
    plain = cast(fx.GraphModule, reduce_graph_module(dict(attributes), imports))
    return GraphBody(_bare(attributes), plain.graph)


@cache
def _graph_attributes() -> frozenset[str]:
    """Attributes that a GraphModule has for its graph, and other modules have not."""
    return frozenset(vars(fx.GraphModule(nn.Module(), fx.Graph()))) - frozenset(vars(nn.Module()))


def _without_graph(attributes: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in attributes.items() if key not in _graph_attributes()}


def _bare(attributes: Mapping[str, Any]) -> nn.Module:
    """A module with these attributes and no forward."""
    holder = nn.Module()
    for key, value in _without_graph(attributes).items():
        holder.__dict__[key] = value.copy() if isinstance(value, (dict, set)) else value
    return holder
