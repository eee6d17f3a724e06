"""Arguments of framework-free functions that are refused."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

from lightning_filterdiv.centripetal import cluster_filters
from lightning_filterdiv.channel_graph import ChannelGraph
from lightning_filterdiv.channel_graph.errors import ChannelGraphError, ExampleInputsError, NarrowingError
from lightning_filterdiv.channel_importance import insert_gates, measure_importance, select_channels
from lightning_filterdiv.expansion import contract, expand
from lightning_filterdiv.filters import NoLayersError, write_filters
from lightning_filterdiv.narrowing import merge_channels, tie_channels
from lightning_filterdiv.narrowing.merge import NotTiedError
from lightning_filterdiv.orthonormality import (
    basis_penalty,
    convolutional_orthogonality,
    soft_orthogonality,
    spectral_restricted_isometry,
)
from lightning_filterdiv.repr_.functional import rank_filters, select_dropped
from lightning_filterdiv.shared_basis import SharingError, share_filter_bases
from lightning_filterdiv.similarity import cosine_similarity, expected_abs_cosine
from lightning_filterdiv.wavelet import WaveletReconstruction
from tests.suites.wrong_uses.row import Row
from tests.suites.wrong_uses.support import (
    CLUSTERS,
    IMAGES,
    graph,
    net,
    prune,
)

FUNCTIONAL: list[Row] = [
    Row(
        "rank a tensor without names",
        lambda: rank_filters(torch.zeros(3, 4)),
        TypeError,
        "filters",
        "dict of layer name -> tensor",
    ),
    Row(
        "rank kernels",
        lambda: rank_filters({"conv1": torch.zeros(2, 3, 3, 3)}),
        ValueError,
        "conv1",
        "filter_matrix(conv)",
    ),
    Row(
        "rank NaN",
        lambda: rank_filters({"conv1": torch.full((2, 3), float("nan"))}),
        ValueError,
        "conv1",
        "has the training diverged?",
    ),
    Row(
        "rank by something else",
        lambda: rank_filters({"conv1": torch.ones(2, 3)}, "size"),
        ValueError,
        "criterion",
        "'orthogonality', 'norm', 'random'",
    ),
    Row(
        "drop from lists",
        lambda: select_dropped({"conv1": [0.1, 0.2]}, 0.5),
        TypeError,
        "scores['conv1']",
        "torch.as_tensor",
    ),
    Row(
        "similarity of a vector",
        lambda: cosine_similarity(torch.zeros(3)),
        ValueError,
        "(3,)",
        "filter_matrix(conv)",
    ),
    Row(
        "similarity of an array",
        lambda: cosine_similarity(np.zeros((3, 4))),
        TypeError,
        "ndarray",
        "torch.as_tensor",
    ),
    Row("a fan-in of text", lambda: expected_abs_cosine("27"), TypeError, "fan_in", ">= 1"),
    Row(
        "no matrix",
        lambda: basis_penalty([]),
        ValueError,
        "basis_penalty",
        "at least one matrix",
    ),
    Row(
        "one mask too many",
        lambda: basis_penalty([torch.zeros(2, 3)], [None, None]),
        ValueError,
        "2 masks",
        "one mask (or None) for each",
    ),
    Row(
        "a mask of another size",
        lambda: basis_penalty(torch.zeros(2, 3), [torch.ones(3, 3, dtype=torch.bool)]),
        ValueError,
        "masks",
        "(2, 2) for filters (2, 3)",
    ),
    Row(
        "soft orthogonality of an array",
        lambda: soft_orthogonality(np.zeros((2, 2))),
        TypeError,
        "ndarray",
        "torch.as_tensor",
    ),
    Row(
        "a start of another length",
        lambda: spectral_restricted_isometry(torch.zeros(2, 3), torch.zeros(3)),
        ValueError,
        "start",
        "shape (2,)",
    ),
    Row(
        "a matrix as kernels",
        lambda: convolutional_orthogonality(torch.zeros(2, 3)),
        ValueError,
        "kernels",
        "(J, C, *k)",
    ),
    Row(
        "a stride of zero",
        lambda: convolutional_orthogonality(torch.zeros(2, 3, 3, 3), 0),
        ValueError,
        "stride",
        ">= 1",
    ),
    Row(
        "more clusters than filters",
        lambda: cluster_filters(torch.zeros(4, 3), 5),
        ValueError,
        "n_clusters",
        "between 1 and the 4 filters",
    ),
    Row(
        "half a cluster",
        lambda: cluster_filters(torch.zeros(4, 3), 2.5),
        TypeError,
        "n_clusters",
        "an integer between 1",
    ),
    Row(
        "clusters of NaN",
        lambda: cluster_filters(torch.full((4, 3), float("nan")), 2),
        ValueError,
        "filters",
        "has the training diverged?",
    ),
    Row(
        "merge an unknown group",
        lambda: merge_channels(net(), {"9": CLUSTERS}, IMAGES),
        NarrowingError,
        "'9'",
        "the groups are 0, 2",
    ),
    Row(
        "merge with too few numbers",
        lambda: merge_channels(net(), {"0": CLUSTERS[:2]}, IMAGES),
        NarrowingError,
        "group '0'",
        "4 channels",
    ),
    Row(
        "merge with a negative number",
        lambda: merge_channels(net(), {"0": CLUSTERS - 1}, IMAGES),
        NarrowingError,
        "group '0'",
        "from 0",
    ),
    Row(
        "merge with a list",
        lambda: merge_channels(net(), {"0": [0, 0, 1, 2]}, IMAGES),
        NarrowingError,
        "group '0'",
        "torch.tensor([...])",
    ),
    Row(
        "merge untied clusters",
        lambda: merge_channels(net(), {"0": CLUSTERS}, IMAGES),
        NotTiedError,
        "0.bias",
        "Train longer or with a larger strength",
    ),
    Row(
        "merge without an input",
        lambda: merge_channels(net(), {"0": CLUSTERS}),
        ExampleInputsError,
        "Sequential",
        "pass example_inputs=",
    ),
    Row(
        "merge with an input of three channels",
        lambda: merge_channels(net(), {"0": CLUSTERS}, torch.zeros(2, 3, 8, 8)),
        ExampleInputsError,
        "submodule '0'",
        "to have 1 channels",
    ),
    Row(
        "merge with text for an input",
        lambda: merge_channels(net(), {"0": CLUSTERS}, "image"),
        ExampleInputsError,
        "submodule '0'",
        "got (str",
    ),
    Row(
        "merge a submodule that is not there",
        lambda: merge_channels(net(), {"0": CLUSTERS}, IMAGES, network="body"),
        ChannelGraphError,
        "network='body'",
        "its children are '0'",
    ),
    Row(
        "merge no network",
        lambda: merge_channels("net", {"0": CLUSTERS}, IMAGES),
        TypeError,
        "model",
        "build the network first",
    ),
    Row(
        "tie an output",
        lambda: tie_channels(net(), {"5": torch.tensor([0, 0])}, IMAGES),
        NarrowingError,
        "'5' (network output)",
        "the groups are 0, 2",
    ),
    Row(
        "share without stages",
        lambda: share_filter_bases(net()),
        SharingError,
        "Sequential",
        "layers=[...]",
    ),
    Row(
        "share one name",
        lambda: share_filter_bases(net(), layers="0"),
        TypeError,
        "layers",
        "a list of name patterns",
    ),
    Row(
        "share a linear layer",
        lambda: share_filter_bases(net(), layers=["0", "5"]),
        SharingError,
        "'5'",
        "leave this layer out",
    ),
    Row(
        "share between unlike layers",
        lambda: share_filter_bases(net(), layers=["0", "2"]),
        SharingError,
        "'2'",
        "Leave one of them out",
    ),
    Row(
        "share a layer that is not there",
        lambda: share_filter_bases(net(), layers=["0", "7"]),
        SharingError,
        "'7'",
        "Available: '0', '2'",
    ),
    Row(
        "expand a linear layer as a convolution",
        lambda: expand(nn.Linear(2, 2)),
        NoLayersError,
        "kind='CL'",
        "build the network in __init__",
    ),
    Row(
        "contract what is not expanded",
        lambda: contract(net()),
        NoLayersError,
        "Sequential",
        "call expand first",
    ),
    Row(
        "contract no network",
        lambda: contract("net"),
        TypeError,
        "model",
        "build the network first",
    ),
    Row(
        "keep channels that are not there",
        lambda: prune({"0": torch.tensor([0, 9])}),
        ValueError,
        "keep['0']",
        "0..3",
    ),
    Row(
        "keep channels by letter",
        lambda: prune({"0": [0, "a"]}),
        ValueError,
        "keep['0']",
        "as integers",
    ),
    Row(
        "prune an unknown group",
        lambda: prune({"9": torch.tensor([0])}),
        NarrowingError,
        "'9'",
        "the groups are 0, 2",
    ),
    Row(
        "importance of another network",
        lambda: select_channels(graph(), {"0": torch.ones(5)}),
        ValueError,
        "'0'",
        "measure it on this one",
    ),
    Row(
        "importance of nothing",
        lambda: select_channels(graph(), {}),
        NoLayersError,
        "gate",
        "name layers in include",
    ),
    Row(
        "gates that are not there",
        lambda: measure_importance(net(), [IMAGES]),
        NoLayersError,
        "Sequential",
        "insert_gates or ChannelImportance",
    ),
    Row(
        "gates behind another kind",
        lambda: insert_gates(nn.Sequential(nn.Conv1d(2, 2, 3)), include=["0"]),
        ValueError,
        "layer '0'",
        "leave it out with exclude",
    ),
    Row(
        "an unknown wavelet",
        lambda: WaveletReconstruction(wavelet="nope"),
        ValueError,
        "wavelet",
        "'haar'",
    ),
    Row(
        "an unknown sub-band",
        lambda: WaveletReconstruction(wavelet="haar", keep=["up"]),
        ValueError,
        "keep",
        "'horizontal'",
    ),
    Row(
        "a filter that is not there",
        lambda: write_filters(nn.Conv2d(2, 3, 3), [5], torch.zeros(1, 18)),
        IndexError,
        "rows",
        "0..2",
    ),
    Row(
        "filters by mask",
        lambda: write_filters(nn.Conv2d(2, 3, 3), [True], torch.zeros(1, 18)),
        TypeError,
        "rows",
        "integers (filter indices)",
    ),
    Row(
        "filters of another size",
        lambda: write_filters(nn.Conv2d(2, 3, 3), [0], torch.zeros(1, 17)),
        ValueError,
        "values",
        "(1, 18)",
    ),
    Row(
        "trace without convolutions",
        lambda: ChannelGraph.trace(nn.Linear(2, 2), torch.zeros(1, 2)),
        ChannelGraphError,
        "Linear",
        "trace a network with some",
    ),
    Row("a group that is not there", lambda: graph().group("9"), KeyError, "'9'", "the groups are 0, 2"),
]
