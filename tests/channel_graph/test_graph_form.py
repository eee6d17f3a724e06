"""Forwards that fix widths, written as graphs: exact at any counts, sizes and modes; copied, saved, squeezed again."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from lightning_filterdiv.channel_graph import ChannelGraph, NarrowingError
from lightning_filterdiv.channel_graph.forms import refusal
from lightning_filterdiv.channel_graph.narrow import Narrowing, merging, tie
from lightning_filterdiv.channel_graph.verify import compare, prove, randomise, verify
from lightning_filterdiv.narrowing import MergedFileError, load_merged, merge_channels, save_merged

from .checks import EXACT, check_exact

IMAGE = torch.rand(1, 3, 16, 16)
INF = float("inf")
FIRST = "body.first.0.weight"


def conv(reads: int, writes: int, groups: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(reads, writes, 3, padding=1, groups=groups, bias=False), nn.BatchNorm2d(writes), nn.ReLU(inplace=True)
    )


class Slices(nn.Module):
    """The first channels are treated, the others pass."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = conv(8, 12), conv(5, 5), conv(12, 8)

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        return self.c(torch.cat([self.b(y[:, :5]), y[:, 5:]], 1))


class Written(Slices):
    """The same by writing into the tensor."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x).clone()
        y[:, :5] = self.b(y[:, :5])
        return self.c(y)


class Res2Net(nn.Module):
    """Branches of stored widths, each added to the next."""

    def __init__(self) -> None:
        super().__init__()
        self.width, self.first, self.last = 4, conv(8, 16), conv(16, 8)
        self.convs = nn.ModuleList(conv(4, 4) for _ in range(3))
        self.pool = nn.AvgPool2d(3, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        parts = torch.split(self.first(x), self.width, 1)
        found = []
        for i, branch in enumerate(self.convs):
            found.append(branch(parts[i] if i == 0 else found[-1] + parts[i]))
        return x + self.last(torch.cat([*found, self.pool(parts[-1])], 1))


class Ghost(nn.Module):
    """Cheap copies beside the originals, cut to an odd number."""

    def __init__(self) -> None:
        super().__init__()
        self.primary, self.cheap, self.after = conv(8, 6), conv(6, 6, groups=6), conv(11, 8)

    def forward(self, x: Tensor) -> Tensor:
        y = self.primary(x)
        return self.after(torch.cat([y, self.cheap(y)], 1)[:, :11])


class C2f(nn.Module):
    """YOLOv8's: two halves, and a list that grows."""

    def __init__(self) -> None:
        super().__init__()
        self.cv1, self.cv2 = conv(8, 12), conv(24, 8)
        self.m = nn.ModuleList(conv(6, 6) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        y = list(self.cv1(x).split((6, 6), 1))
        y.extend(m(y[-1]) for m in self.m)
        return self.cv2(torch.cat(y, 1))


class Shuffle(nn.Module):
    """A channel shuffle of what two branches made."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right, self.after = conv(8, 6), conv(8, 6), conv(12, 8)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.cat([self.left(x), self.right(x)], 1)
        n, c, h, w = y.shape
        return self.after(y.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w))


class Numbers(nn.Module):
    """A flatten, with the number of its results."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.pool, self.fc, self.back = conv(8, 6), nn.AdaptiveAvgPool2d(2), nn.Linear(24, 5), nn.Linear(5, 8)

    def forward(self, x: Tensor) -> Tensor:
        scale = self.back(F.relu(self.fc(self.pool(self.a(x)).view(-1, 24))))
        return x * torch.sigmoid(scale.view(-1, 8, 1, 1))


class Halves(nn.Module):
    """One half gates the other, with sizes read off the image."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.drop, self.b = conv(8, 12), nn.Dropout(0.5), conv(12, 8)

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        small = F.interpolate(y[:, 6:], size=(y.shape[2] // 2, y.shape[3] // 2))
        gate = F.interpolate(small, size=y.shape[2:])
        return self.b(torch.cat([y[:, :6] * gate.sigmoid(), self.drop(y[:, :6])], 1))


class Sized(nn.Module):
    """Gets the size of its image from the caller, and asks how many windows there are for each of them."""

    class Halves(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = conv(8, 12), conv(6, 8)

        def forward(self, windows: Tensor, place: Tensor, size: tuple[int, ...]) -> Tensor:
            y = self.a(windows)
            items = len(windows) // len(place)
            y = y[:, :6] * (y[:, 6:] + place.unsqueeze(0).expand(items, -1, -1, -1, -1).reshape(-1, 1, 8, 8))
            return self.b(F.interpolate(y, size=size[2:]))

    def __init__(self) -> None:
        super().__init__()
        self.inner = Sized.Halves()

    def forward(self, x: Tensor) -> Tensor:
        n, c, h, w = x.shape
        windows = x.reshape(n, c, h // 8, 8, w // 8, 8).permute(0, 2, 4, 1, 3, 5).reshape(-1, c, 8, 8)
        place = torch.ones(h // 8 * (w // 8), 1, 8, 8, dtype=x.dtype, device=x.device)
        return self.inner(windows, place, x.shape).view(n, -1, 8, h, w).mean(1)


BODIES = {kind.__name__: kind for kind in (Slices, Written, Res2Net, Ghost, C2f, Shuffle, Numbers, Halves)}


class Net(nn.Module):
    """A stem, a body, a head."""

    def __init__(self, body: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.stem, self.body, self.pool, self.head = conv(3, 8), body(), nn.AdaptiveAvgPool2d(1), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.flatten(self.pool(self.body(self.stem(x))), 1))


def unequal_clusters(graph: ChannelGraph, seed: int = 0) -> dict[str, Tensor]:
    """Another share of every group."""
    generator = torch.Generator().manual_seed(seed)
    clusters = {}
    for i, group in enumerate(graph.groups):
        kept = max(1, round(group.size * (0.4 + 0.15 * (i % 4))))
        more = torch.randint(kept, (group.size - kept,), generator=generator)
        clusters[group.name] = torch.cat([torch.arange(kept), more])[torch.randperm(group.size, generator=generator)]
    return clusters


def tied(name: str) -> tuple[nn.Module, ChannelGraph, dict[str, Tensor]]:
    torch.manual_seed(0)
    model = Net(BODIES[name]).double().eval()
    randomise(model, torch.Generator().manual_seed(0))
    graph = ChannelGraph.trace(model, IMAGE)
    clusters = unequal_clusters(graph)
    tie(model, graph, clusters)
    return model, graph, clusters


@pytest.mark.parametrize("name", BODIES)
def test_any_counts_are_exact_at_every_size_and_in_both_modes(name: str) -> None:
    model, graph, clusters = tied(name)
    assert set(graph.pinned) == {"head"}
    narrowing = Narrowing(graph, *merging(graph, clusters))
    assert prove(model, narrowing, graph).difference <= EXACT
    narrow = narrowing(model)
    assert type(narrow) is Net
    assert [(c.submodule, c.form) for c in narrowing.forms] == [("body", "graph")]
    assert isinstance(narrow.body, fx.GraphModule)
    assert narrow.state_dict().keys() == model.state_dict().keys()
    assert sum(p.numel() for p in narrow.parameters()) < 0.7 * sum(p.numel() for p in model.parameters())
    for shape in [(5, 3, 16, 16), (2, 3, 24, 40)]:
        images = torch.rand(shape, dtype=torch.float64)
        assert compare(model, narrow, (images,), {}) <= EXACT
        both = [copy.deepcopy(network).train() for network in (model, narrow)]
        for network in both:
            for module in network.modules():
                module.training = module.training and not isinstance(module, nn.Dropout)
        assert compare(both[0], both[1], (images,), {}) <= EXACT
        assert compare(model, narrow, (images,), {}) <= EXACT
        assert compare(both[0].eval(), both[1].eval(), (images,), {}) <= EXACT, "running statistics differ"


def test_a_size_among_the_arguments_and_a_quotient_of_two_sizes() -> None:
    model = Net(Sized)
    graph, narrow = check_exact(model, IMAGE)
    assert set(graph.pinned) == {"head"}
    assert isinstance(narrow.body.inner, fx.GraphModule)
    for shape in [(5, 3, 16, 16), (2, 3, 24, 40)]:
        assert compare(model, narrow, (torch.rand(shape, dtype=torch.float64),), {}) <= EXACT


class Residual(nn.Module):
    """Calls what it keeps as ``module``, as wrappers do, and adds to it."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: Tensor) -> Tensor:
        return x + self.module(x)


def test_a_module_that_keeps_another_as_module_is_no_wrapper() -> None:
    graph, narrow = check_exact(Net(lambda: nn.Sequential(Residual(Res2Net()), Residual(conv(8, 8)))), IMAGE)
    assert set(graph.pinned) == {"head"}
    assert isinstance(narrow.body[0].module, fx.GraphModule)
    assert type(narrow.body[0]) is Residual

    class Split(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.wide, self.left, self.right = conv(8, 12), Residual(conv(5, 5)), Residual(nn.Conv2d(7, 7, 1))

        def forward(self, x: Tensor) -> Tensor:
            y = self.wide(x)
            return x + torch.cat([self.left(y[:, :5]), self.right(y[:, 5:])], 1)[:, :8]

    graph, narrow = check_exact(Net(Split), IMAGE)
    assert isinstance(narrow.body, fx.GraphModule)


class Padded(nn.Module):
    """Windows of five, to which every image is padded (Swin)."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = conv(8, 12), conv(6, 8)

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        height, width = y.shape[2:]
        y = F.pad(y, (0, (5 - width % 5) % 5, 0, (5 - height % 5) % 5))
        y = y.view(y.shape[0], 12, y.shape[2] // 5, 5, y.shape[3] // 5, 5)
        y = (y * y.mean((3, 5), keepdim=True).sigmoid()).reshape(y.shape[0], 12, -1, y.shape[4] * 5)
        return self.b(y[:, :6] + y[:, 6:])[:, :, :height, :width].contiguous()


@pytest.mark.parametrize("size", [16, 20])  # 20: nothing to pad, nothing to cut off, nothing to copy
def test_images_that_forward_pads_to_whole_windows(size: int) -> None:
    model = Net(Padded)
    graph, narrow = check_exact(model, torch.rand(1, 3, size, size))
    assert set(graph.pinned) == {"head"}
    assert isinstance(narrow.body, fx.GraphModule)
    for size in range(13, 19):
        assert compare(model, narrow, (torch.rand(2, 3, size, 31 - size, dtype=torch.float64),), {}) <= EXACT


@pytest.mark.parametrize("name", BODIES)
def test_it_is_copied_pickled_saved_trained_and_squeezed_again(name: str, tmp_path: Path) -> None:
    model, _, clusters = tied(name)
    narrow, report = merge_channels(model, clusters, IMAGE)
    assert "graph" in str(report)
    images = torch.rand(3, 3, 16, 24, dtype=torch.float64)
    for stage in range(2):
        save_merged(narrow, tmp_path / "narrow.pt")
        assert torch.load(tmp_path / "narrow.pt", weights_only=True)["graphs"] == ["body"]
        fresh = Net(BODIES[name]).double().eval()
        inner = fresh.body
        loaded = load_merged(fresh, tmp_path / "narrow.pt")
        assert loaded is fresh
        assert loaded.body is not inner
        copies = [copy.deepcopy(narrow), pickle.loads(pickle.dumps(narrow)), loaded]
        for other in copies:
            assert torch.equal(other(images), narrow(images))
            assert other.state_dict().keys() == narrow.state_dict().keys()
        optimizer = torch.optim.SGD(loaded.parameters(), lr=0.1)
        loaded.train()(images).square().sum().backward()
        assert all(p.grad is not None for p in loaded.parameters())
        optimizer.step()
        if stage == 0:
            graph = ChannelGraph.trace(loaded.eval(), IMAGE)
            again = unequal_clusters(graph, seed=1)
            tie(loaded, graph, again)
            narrower, second = merge_channels(loaded, again, IMAGE)
            assert second.trim <= EXACT
            assert second.parameters_after < report.parameters_after
            narrow = narrower


@pytest.mark.parametrize("name", ["Res2Net", "Shuffle", "Halves"])
def test_export_with_a_dynamic_batch_and_onnx(name: str) -> None:
    import onnxruntime

    model, _, clusters = tied(name)
    narrow = merge_channels(model, clusters, IMAGE).network.float()
    images = torch.rand(5, 3, 16, 16)
    batch = {0: torch.export.Dim("batch")}
    exported = torch.export.export(narrow, (images[:2],), dynamic_shapes=(batch,))
    torch.testing.assert_close(exported.module()(images), narrow(images))
    file = io.BytesIO()
    torch.onnx.export(narrow, (images[:2],), file, dynamo=True, dynamic_shapes=(batch,), verbose=False)
    session = onnxruntime.InferenceSession(file.getvalue())
    (result,) = session.run(None, {session.get_inputs()[0].name: images.numpy()})
    torch.testing.assert_close(torch.from_numpy(result), narrow(images), rtol=1e-4, atol=1e-5)
    compiled = torch.compile(copy.deepcopy(narrow), backend="eager")
    torch.testing.assert_close(compiled(images), narrow(images))


def test_forms_as_wanted() -> None:
    model, graph, clusters = tied("Shuffle")
    even = {g.name: torch.arange(g.size) // 2 for g in graph.groups}
    for form, expected in (("auto", "module"), ("module", "module"), ("graph", "graph")):
        narrow, report = merge_channels(model, even, IMAGE, tolerance=INF, form=form)  # type: ignore[arg-type]
        assert [c.form for c in report.forms] == [expected], form
        assert isinstance(narrow.body, fx.GraphModule) == (expected == "graph")
        assert report.trim <= EXACT
    with pytest.raises(NarrowingError, match=r'cannot express.*form="auto" writes such a forward as a graph'):
        merge_channels(model, clusters, IMAGE, tolerance=INF, form="module")
    with pytest.raises(ValueError, match="form"):
        merge_channels(model, clusters, IMAGE, form="grahp")  # type: ignore[arg-type]


class Dropping(Res2Net):
    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(super().forward(x), 0.1, self.training)


class Training(Res2Net):
    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        return y * 2 if self.training else y


class Sign(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.sign()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return gradients[0]


class Binary(Res2Net):
    def forward(self, x: Tensor) -> Tensor:
        return Sign.apply(super().forward(x))


class Module(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.tail, self.head = conv(3, 8), conv(8, 6), nn.Conv2d(6, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.stem(x)
        return self.head(self.tail(torch.cat([y[:, :3].tanh(), y[:, 3:]], 1)))


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (Net(Dropping), r"body has no graph form: forward itself draws random numbers.*make it a submodule"),
        (Net(Training), r"body has no graph form: forward runs mul only in training mode"),
        (Net(Binary), r"body has no graph form: .* the autograd function Sign, whose gradient would be lost"),
        (
            Module(),
            r"Module, a LightningModule, which keeps its class; move those lines into a submodule",
        ),
    ],
    ids=["dropout", "training branch", "custom gradient", "LightningModule"],
)
def test_what_exists_in_training_only_is_refused_by_name(model: nn.Module, reason: str) -> None:
    graph = ChannelGraph.trace(model.eval(), IMAGE)
    with pytest.raises(NarrowingError, match=reason):
        merge_channels(model, {g.name: torch.arange(g.size) % 2 for g in graph.groups}, IMAGE, tolerance=INF)
    assert graph.verify() <= EXACT, "what forward follows by itself is there in module form"


def test_a_lightning_module_around_a_body_stays_what_it_is() -> None:
    class Around(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = Net(Res2Net)

        def forward(self, x: Tensor) -> Tensor:
            return self.net(x)

    model = Around().eval()
    graph = ChannelGraph.trace(model, IMAGE)
    narrow, report = merge_channels(model, unequal_clusters(graph), IMAGE, tolerance=INF)
    assert isinstance(narrow, Around)
    assert [c.submodule for c in report.forms] == ["net.body"]


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (lambda c: c["tensors"].update({FIRST: c["tensors"][FIRST][:, :1]}), "contradict"),
        (lambda c: c["steps"][""][0]["keep"].update({FIRST: torch.tensor([0])}), "contradict|cannot be"),
        (lambda c: c["steps"][""][0].update(inputs=3), "cannot be narrowed in the same way"),
        (lambda c: c["steps"][""][0]["inputs"]["tuple"].__setitem__(1, "text"), "cannot be narrowed in the same way"),
        (lambda c: c["steps"][""][0].update(form="other"), "entry 'steps'"),
        (lambda c: c.update(graphs=[]), "contradict"),
        (lambda c: c["steps"].update({"nowhere": c["steps"][""]}), "another way"),
    ],
    ids=["in channels", "kept filters", "inputs", "call", "form", "graphs", "place"],
)  # fmt: skip
def test_a_file_that_contradicts_itself_is_refused_before_anything_changes(
    edit: Callable[[dict[str, object]], None], words: str, tmp_path: Path
) -> None:
    model, _, clusters = tied("Res2Net")
    save_merged(merge_channels(model, clusters, IMAGE).network, tmp_path / "narrow.pt")
    content = torch.load(tmp_path / "narrow.pt", weights_only=True)
    edit(content)
    torch.save(content, tmp_path / "edited.pt")
    fresh = Net(Res2Net).double()
    before = {key: value.clone() for key, value in fresh.state_dict().items()}
    with pytest.raises(MergedFileError, match=words):
        load_merged(fresh, tmp_path / "edited.pt")
    assert type(fresh.body) is Res2Net
    assert all(torch.equal(value, before[key]) for key, value in fresh.state_dict().items())


class CrossCovariance(nn.Module):
    """Attention over channels that shapes what its pinned layers put out by the width of its input (XCA)."""

    def __init__(self, dim: int, heads: int = 2) -> None:
        super().__init__()
        self.heads, self.qkv, self.proj = heads, nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        b, n, c = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, self.heads, -1).permute(2, 0, 3, 4, 1).unbind(0)
        attention = (q @ k.transpose(-2, -1)).softmax(-1)
        return self.proj((attention @ v).permute(0, 3, 1, 2).reshape(b, n, c))


class Splits(nn.Module):
    """A body that fixes widths, around one that holds them as a number."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.conv = nn.Conv2d(3, 12, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
        self.attention, self.out = CrossCovariance(12), nn.Conv2d(12, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = torch.cat([self.conv(x[:, :4]), x[:, 4:]], 1)
        b, _, h, w = x.shape
        tokens = x.flatten(2).permute(0, 2, 1)
        tokens = tokens + self.attention(tokens)
        return self.out(tokens.permute(0, 2, 1).reshape(b, -1, h, w))


def test_a_width_held_as_a_number_inside_of_a_body_that_is_written() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 3, 1), Splits()).eval()
    graph = ChannelGraph.trace(model, torch.rand(1, 3, 8, 8))
    assert {"1.attention.qkv"} <= graph.pinned.keys()
    stream = [group for group in graph.groups if group.name.startswith("1.stem")]
    assert sum(group.size for group in stream) + sum(g.size for g in graph.groups if g.name == "1.conv") >= 12
    for seed in range(3):
        assert graph.verify(seed=seed) <= 1e-12


class Scale(nn.Module):
    """A scale per channel, laid out by a number that it keeps, as in PoolFormer."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.shape, self.scale = (channels, 1, 1), nn.Parameter(torch.rand(channels))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale.view(self.shape)


class Scaled(nn.Module):
    def __init__(self, reads: int, channels: int) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(reads, channels, 3, padding=1), nn.Conv2d(channels, channels, 1)
        self.scales = nn.ModuleList([Scale(channels) for _ in range(3)])

    def forward(self, x: Tensor) -> Tensor:
        x = self.scales[0](self.first(x))
        return self.scales[1](x) + self.scales[2](self.second(x))


def test_several_bodies_that_hold_the_number_of_one_group() -> None:
    graph, narrow = check_exact(nn.Sequential(Scaled(3, 8), Scaled(8, 12), nn.Conv2d(12, 4, 1)), IMAGE)
    assert graph.pinned == {"2": "network output"}
    assert all(isinstance(scale, fx.GraphModule) for block in narrow[:2] for scale in block.scales)


class Gated(nn.Module):
    """One gate without parameters, called twice with other channels, as in NAFNet."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(channels, 24, 1), nn.Conv2d(12, channels, 1)
        self.third, self.fourth = nn.Conv2d(channels, 24, 1), nn.Conv2d(12, channels, 1)
        self.gate = Halved()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.second(self.gate(self.first(x)))
        return x + self.fourth(self.gate(self.third(x)))


class Halved(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        first, second = x.chunk(2, 1)
        return first * second


def test_a_body_called_with_other_channels_stays_beside_one_that_is_written() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), Gated(8), Slices(), nn.Conv2d(8, 4, 1))
    model = model.double().eval()
    randomise(model, torch.Generator().manual_seed(0))
    graph = ChannelGraph.trace(model, IMAGE)
    assert graph.pinned == {"3": "network output"}
    clusters = {g.name: torch.arange(g.size) % (3 if g.name.startswith("2") else g.size // 2) for g in graph.groups}
    tie(model, graph, clusters)
    narrow, report = merge_channels(model, clusters, IMAGE)
    assert report.trim <= EXACT
    assert type(narrow[1].gate) is Halved
    assert isinstance(narrow[2], fx.GraphModule)


class Checked(nn.Module):
    """A body that compares the width of what it is given with a number before it calls a layer, as in diffusers."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.channels, self.conv = channels, nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor, scale: Tensor | None = None, **options: Tensor) -> Tensor:
        assert x.shape[1] == self.channels
        x = self.conv(x) if scale is None else self.conv(x) * scale
        return x + options["shift"] if options else x


class Checks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.checked, self.bare = nn.Conv2d(3, 12, 1), Checked(12), Checked(12)
        self.moments, self.last = nn.Conv2d(12, 8, 1), nn.Conv2d(4, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.checked(self.bare(self.first(x)), shift=x.mean(1, keepdim=True))
        mean, deviation = self.moments(y).chunk(2, 1)  # this forward has no graph form: it draws random numbers
        return self.last(mean + deviation.exp() * torch.randn_like(mean) if self.training else mean * deviation)


def test_a_check_of_widths_makes_the_body_that_runs_it_a_graph() -> None:
    graph, narrow = check_exact(Checks(), IMAGE)
    assert graph.pinned == {"last": "network output"}
    assert isinstance(narrow.checked, fx.GraphModule)
    assert isinstance(narrow.bare, fx.GraphModule)
    assert type(narrow.bare.conv) is nn.Conv2d
    assert type(narrow) is Checks


class _Whole(nn.Module):
    """A GhostNet block whose slice is the whole tensor."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(width, width // 2, 1), nn.Conv2d(width // 2, width // 2, 3, padding=1)
        self.width = width

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        return torch.cat([x, self.second(x)], dim=1)[:, : self.width]


class _AddedInPlace(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.ghost, self.shortcut = _Whole(width), nn.Conv2d(width, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.ghost(x)
        y += self.shortcut(x)
        return y


def test_what_is_added_in_place_to_a_whole_slice_reads_nothing_else() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), _AddedInPlace(8), nn.Conv2d(8, 4, 3)).eval()
    graph = ChannelGraph.trace(model, torch.zeros(1, 3, 12, 12))
    assert refusal(graph, "1") is None
    assert graph.pinned == {"2": "network output"}
    assert verify(graph).exact
