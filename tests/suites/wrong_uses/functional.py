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
        "filters must be a dict of layer name -> tensor, got Tensor",
    ),
    Row(
        "rank kernels",
        lambda: rank_filters({"conv1": torch.zeros(2, 3, 3, 3)}),
        ValueError,
        "conv1: filters must be a (J, d) matrix with d >= 1, got shape (2, 3, 3, 3); filter_matrix(conv) makes one",
    ),
    Row(
        "rank NaN",
        lambda: rank_filters({"conv1": torch.full((2, 3), float("nan"))}),
        ValueError,
        "conv1: 2 of 2 filters contain NaN or inf; has the training diverged?",
    ),
    Row(
        "rank by something else",
        lambda: rank_filters({"conv1": torch.ones(2, 3)}, "size"),
        ValueError,
        "criterion must be one of 'orthogonality', 'norm', 'random', got 'size'",
    ),
    Row(
        "drop from lists",
        lambda: select_dropped({"conv1": [0.1, 0.2]}, 0.5),
        TypeError,
        "scores['conv1'] must be a torch.Tensor, got list; torch.as_tensor(...) makes one of numbers",
    ),
    Row(
        "similarity of a vector",
        lambda: cosine_similarity(torch.zeros(3)),
        ValueError,
        "filters must be a (J, d) matrix or a (B, J, d) batch, got shape (3,); use filter_matrix(conv) to get the "
        "matrix of a layer",
    ),
    Row(
        "similarity of an array",
        lambda: cosine_similarity(np.zeros((3, 4))),
        TypeError,
        "filters must be a torch.Tensor, got ndarray; torch.as_tensor(...) makes one of numbers",
    ),
    Row("a fan-in of text", lambda: expected_abs_cosine("27"), TypeError, "fan_in must be an integer >= 1, got '27'"),
    Row(
        "no matrix",
        lambda: basis_penalty([]),
        ValueError,
        "basis_penalty needs at least one matrix and one mask (or None) for each, got 0 matrices and 0 masks",
    ),
    Row(
        "one mask too many",
        lambda: basis_penalty([torch.zeros(2, 3)], [None, None]),
        ValueError,
        "basis_penalty needs at least one matrix and one mask (or None) for each, got 1 matrices and 2 masks",
    ),
    Row(
        "a mask of another size",
        lambda: basis_penalty(torch.zeros(2, 3), [torch.ones(3, 3, dtype=torch.bool)]),
        ValueError,
        "masks must have one row and one column per filter, (2, 2) for filters (2, 3), got (3, 3)",
    ),
    Row(
        "soft orthogonality of an array",
        lambda: soft_orthogonality(np.zeros((2, 2))),
        TypeError,
        "filters must be a torch.Tensor, got ndarray; torch.as_tensor(...) makes one of numbers",
    ),
    Row(
        "a start of another length",
        lambda: spectral_restricted_isometry(torch.zeros(2, 3), torch.zeros(3)),
        ValueError,
        "start must have shape (2,), one entry per row of the smaller side of filters (2, 3), got (3,)",
    ),
    Row(
        "a matrix as kernels",
        lambda: convolutional_orthogonality(torch.zeros(2, 3)),
        ValueError,
        "kernels must be (J, C, *k), or (B, J, C, *k) with one stride per kernel dimension, got shape (2, 3) and "
        "stride 1",
    ),
    Row(
        "a stride of zero",
        lambda: convolutional_orthogonality(torch.zeros(2, 3, 3, 3), 0),
        ValueError,
        "stride must be an integer >= 1, got 0",
    ),
    Row(
        "more clusters than filters",
        lambda: cluster_filters(torch.zeros(4, 3), 5),
        ValueError,
        "n_clusters must be between 1 and the 4 filters, got 5",
    ),
    Row(
        "half a cluster",
        lambda: cluster_filters(torch.zeros(4, 3), 2.5),
        TypeError,
        "n_clusters must be an integer between 1 and the number of filters, got 2.5",
    ),
    Row(
        "clusters of NaN",
        lambda: cluster_filters(torch.full((4, 3), float("nan")), 2),
        ValueError,
        "filters contain NaN or inf, which have no cluster; has the training diverged?",
    ),
    Row(
        "merge an unknown group",
        lambda: merge_channels(net(), {"9": CLUSTERS}, IMAGES),
        NarrowingError,
        "no such channel group: '9'; the groups are 0, 2",
    ),
    Row(
        "merge with too few numbers",
        lambda: merge_channels(net(), {"0": CLUSTERS[:2]}, IMAGES),
        NarrowingError,
        "group '0' has 4 channels: expected that many integers, the number of each one's cluster from 0, got "
        "torch.int64 of shape (2,)",
    ),
    Row(
        "merge with a negative number",
        lambda: merge_channels(net(), {"0": CLUSTERS - 1}, IMAGES),
        NarrowingError,
        "group '0' has 4 channels: expected that many integers, the number of each one's cluster from 0, got "
        "torch.int64 of shape (4,) with the entry -1",
    ),
    Row(
        "merge with a list",
        lambda: merge_channels(net(), {"0": [0, 0, 1, 2]}, IMAGES),
        NarrowingError,
        "group '0' has 4 channels: expected a tensor of that many cluster numbers, got list; torch.tensor([...]) "
        "makes one of a list",
    ),
    Row(
        "merge untied clusters",
        lambda: merge_channels(net(), {"0": CLUSTERS}, IMAGES),
        NotTiedError,
        "Train longer or with a larger strength (CentripetalSGD forecasts it), or pass tolerance=float('inf') to "
        "merge anyway and fine-tune",
    ),
    Row(
        "merge without an input",
        lambda: merge_channels(net(), {"0": CLUSTERS}),
        ExampleInputsError,
        "no example inputs for Sequential: pass example_inputs=..., or set example_input_array on the "
        "LightningModule, or record the first forward call with capture_inputs(module)",
    ),
    Row(
        "merge with an input of three channels",
        lambda: merge_channels(net(), {"0": CLUSTERS}, torch.zeros(2, 3, 8, 8)),
        ExampleInputsError,
        "submodule '0' (Conv2d) does not accept the example inputs: Given groups=1, weight of size [4, 1, 3, 3], "
        "expected input[2, 3, 8, 8] to have 1 channels, but got 3 channels instead",
    ),
    Row(
        "merge with text for an input",
        lambda: merge_channels(net(), {"0": CLUSTERS}, "image"),
        ExampleInputsError,
        "submodule '0' (Conv2d) does not accept the example inputs: conv2d() received an invalid combination of "
        "arguments - got (str, FakeTensor, FakeTensor, tuple, tuple, tuple, int)",
    ),
    Row(
        "merge a submodule that is not there",
        lambda: merge_channels(net(), {"0": CLUSTERS}, IMAGES, network="body"),
        ChannelGraphError,
        "Sequential has no submodule network='body'; its children are '0', '1', '2', '3', '4', '5'",
    ),
    Row(
        "merge no network",
        lambda: merge_channels("net", {"0": CLUSTERS}, IMAGES),
        TypeError,
        "model must be a torch.nn.Module, got str; build the network first",
    ),
    Row(
        "tie an output",
        lambda: tie_channels(net(), {"5": torch.tensor([0, 0])}, IMAGES),
        NarrowingError,
        "no such channel group: '5' (network output); the groups are 0, 2",
    ),
    Row(
        "share without stages",
        lambda: share_filter_bases(net()),
        SharingError,
        "Sequential has no stage in which blocks with conv1 and conv2 (ResNet) or inverted residuals (MobileNetV2) "
        "could share a basis; name the convolutions that are to share in layers=[...]",
    ),
    Row(
        "share one name",
        lambda: share_filter_bases(net(), layers="0"),
        TypeError,
        "layers must be a list of name patterns such as ['layer1.*'], got '0'; write layers=['0'] for a single pattern",
    ),
    Row(
        "share a linear layer",
        lambda: share_filter_bases(net(), layers=["0", "5"]),
        SharingError,
        "'5' is a Linear; only nn.Conv2d can share filters, leave this layer out",
    ),
    Row(
        "share between unlike layers",
        lambda: share_filter_bases(net(), layers=["0", "2"]),
        SharingError,
        "'2' has in_channels=4, '0' 1: layers that share a basis must be alike (channels, kernel, padding, "
        "dilation). Leave one of them out, or give them to different groups",
    ),
    Row(
        "share a layer that is not there",
        lambda: share_filter_bases(net(), layers=["0", "7"]),
        SharingError,
        "layers pattern '7' matches no convolution. Available: '0', '2'",
    ),
    Row(
        "expand a linear layer as a convolution",
        lambda: expand(nn.Linear(2, 2)),
        NoLayersError,
        "Linear has no convolution for kind='CL' to expand; build the network in __init__, of nn.Conv2d and nn.Linear "
        "layers",
    ),
    Row(
        "contract what is not expanded",
        lambda: contract(net()),
        NoLayersError,
        "Sequential has no expanded layer to contract; call expand first",
    ),
    Row(
        "contract no network",
        lambda: contract("net"),
        TypeError,
        "model must be a torch.nn.Module, got str; build the network first",
    ),
    Row(
        "keep channels that are not there",
        lambda: prune({"0": torch.tensor([0, 9])}),
        ValueError,
        "keep['0'] must list at least one of the channels 0..3, each once, as integers; got tensor([0, 9])",
    ),
    Row(
        "keep channels by letter",
        lambda: prune({"0": [0, "a"]}),
        ValueError,
        "keep['0'] must list at least one of the channels 0..3, each once, as integers; got [0, 'a']",
    ),
    Row(
        "prune an unknown group",
        lambda: prune({"9": torch.tensor([0])}),
        NarrowingError,
        "no such channel group: '9'; the groups are 0, 2",
    ),
    Row(
        "importance of another network",
        lambda: select_channels(graph(), {"0": torch.ones(5)}),
        ValueError,
        "importance of '0' is that of 5 channels, but the layer has 4: it was measured on another network; measure "
        "it on this one",
    ),
    Row(
        "importance of nothing",
        lambda: select_channels(graph(), {}),
        NoLayersError,
        "no layer with a gate can be pruned alone: gates are behind none, the groups are 0, 2; name layers in include",
    ),
    Row(
        "gates that are not there",
        lambda: measure_importance(net(), [IMAGES]),
        NoLayersError,
        "Sequential has no gates; insert_gates or ChannelImportance adds them",
    ),
    Row(
        "gates behind another kind",
        lambda: insert_gates(nn.Sequential(nn.Conv1d(2, 2, 3)), include=["0"]),
        ValueError,
        "layer '0' is an nn.Conv1d with 1 group; gates go behind ungrouped layers of class nn.Conv2d itself, leave "
        "it out with exclude",
    ),
    Row(
        "an unknown wavelet",
        lambda: WaveletReconstruction(wavelet="nope"),
        ValueError,
        "wavelet must be a discrete wavelet of PyWavelets ('haar', 'db2', ...), got 'nope'",
    ),
    Row(
        "an unknown sub-band",
        lambda: WaveletReconstruction(wavelet="haar", keep=["up"]),
        ValueError,
        "keep may hold 'approximation', 'horizontal', 'vertical', 'diagonal', got 'up'",
    ),
    Row(
        "a filter that is not there",
        lambda: write_filters(nn.Conv2d(2, 3, 3), [5], torch.zeros(1, 18)),
        IndexError,
        "rows must be in 0..2 for a layer of 3 filters, got [5]",
    ),
    Row(
        "filters by mask",
        lambda: write_filters(nn.Conv2d(2, 3, 3), [True], torch.zeros(1, 18)),
        TypeError,
        "rows must be integers (filter indices), got torch.bool: [True]",
    ),
    Row(
        "filters of another size",
        lambda: write_filters(nn.Conv2d(2, 3, 3), [0], torch.zeros(1, 17)),
        ValueError,
        "values must have shape (1, 18): one row of fan-in 18 per filter, got (1, 17)",
    ),
    Row(
        "trace without convolutions",
        lambda: ChannelGraph.trace(nn.Linear(2, 2), torch.zeros(1, 2)),
        ChannelGraphError,
        "Linear has no convolution: there are no channels to speak of; trace a network with some",
    ),
    Row("a group that is not there", lambda: graph().group("9"), KeyError, "no channel group '9'; the groups are 0, 2"),
]
