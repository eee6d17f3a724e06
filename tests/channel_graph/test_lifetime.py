"""A graph keeps its model, and goes with it."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref

from benchmarks.models import channel_graph as models
from lightning_filterdiv.channel_graph import ChannelGraph

from .checks import EXACT, mergeable

IMAGE = models.image()


def test_a_graph_keeps_a_model_that_nobody_else_holds() -> None:
    graph = ChannelGraph.trace(models.plain(), IMAGE)
    gc.collect()
    assert mergeable(graph) == 26
    assert graph.current
    assert graph.verify() <= EXACT


def test_a_model_goes_with_its_graph() -> None:
    model = models.plain()
    graph = ChannelGraph.trace(model, IMAGE)
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is graph.model
    del graph
    assert gone() is None, "without waiting for the garbage collector"


def test_a_model_that_holds_its_graph_is_copied_with_it() -> None:
    model = models.plain()
    model.graph = ChannelGraph.trace(model, IMAGE)
    twin = copy.deepcopy(model)
    assert twin.graph.model is twin
    assert pickle.loads(pickle.dumps(model)).graph.verify() <= EXACT
