"""Damage to files, drawn from a seed: bytes of any file, entries of an archive, values in a tree."""

from __future__ import annotations

import io
import random
import zipfile
from typing import Any

import torch
from torch import Tensor

__all__ = ["mutate"]

_ODD: tuple[Any, ...] = (
    None, True, -1, 0, 3, 2**40, 2**70, 1.5, float("nan"), float("inf"),
    "", "text", "a/../b", "\0\x1b[2J", "слой", [], {}, [1], {"a": 1}, {1: 2},
    torch.zeros(()), torch.zeros(0), torch.zeros(2, 3), torch.zeros(4, 3, 3, 3, dtype=torch.complex64),
    torch.eye(3).to_sparse(), torch.full((4, 1, 3, 3), float("nan")), torch.zeros(8, dtype=torch.int64),
    torch.full((8,), 2**40), torch.full((8,), -1), torch.zeros(8, dtype=torch.float16),
)  # fmt: skip


def mutate(content: bytes, draw: random.Random) -> bytes:
    """A damaged copy of ``content``, a function of it and of the state of ``draw``."""
    kinds = [_flip, _cut, _splice]
    if zipfile.is_zipfile(io.BytesIO(content)):
        kinds += [_inside, _values, _values, _values]
    return draw.choice(kinds)(content, draw)


def _flip(content: bytes, draw: random.Random) -> bytes:
    damaged = bytearray(content)
    for _ in range(draw.choice((1, 3, 20))):
        damaged[draw.randrange(len(damaged))] ^= 1 << draw.randrange(8)
    return bytes(damaged)


def _cut(content: bytes, draw: random.Random) -> bytes:
    return content[: draw.randrange(len(content))]


def _splice(content: bytes, draw: random.Random) -> bytes:
    """Leave out, double or overwrite a few bytes."""
    at, length = draw.randrange(len(content)), draw.choice((1, 2, 7, 64))
    middle = draw.choice((b"", content[at : at + length] * 2, draw.randbytes(length)))
    return content[:at] + middle + content[at + length :]


def _inside(content: bytes, draw: random.Random) -> bytes:
    """Damage the pickle, with a checksum that is right again."""
    made = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as archive, zipfile.ZipFile(made, "w") as copy:
        for entry in archive.infolist():
            inner = archive.read(entry)
            if entry.filename.endswith("data.pkl"):
                inner = draw.choice((_flip, _splice))(inner, draw)
            copy.writestr(entry.filename, inner)
    return made.getvalue()


def _values(content: bytes, draw: random.Random) -> bytes:
    """Replace, rename or remove entries somewhere in the tree, deep ones as likely as shallow ones."""
    tree = torch.load(io.BytesIO(content), weights_only=True)
    for _ in range(draw.choice((1, 1, 3))):
        node, depth = tree, draw.randrange(1, 7)
        while True:
            keys = list(node) if isinstance(node, dict) else list(range(len(node)))
            if not keys:
                break
            key = draw.choice(keys)
            if depth > 1 and isinstance(node[key], dict | list) and node[key]:
                node, depth = node[key], depth - 1
                continue
            action = draw.randrange(4)
            if action == 0 and isinstance(node, dict):
                del node[key]
            elif action == 1 and isinstance(node, dict):
                node[draw.choice(("", "a..b", "training.weight", "module", "\0", "\ud800.weight", 7))] = node.pop(key)
            elif action == 2 and isinstance(node[key], Tensor):
                node[key] = _tensor(node[key], draw)
            else:
                node[key] = draw.choice(_ODD)
            break
    made = io.BytesIO()
    torch.save(tree, made)
    return made.getvalue()


def _tensor(tensor: Tensor, draw: random.Random) -> Tensor:
    """The same tensor in another shape, type or layout."""
    if tensor.layout != torch.strided:
        return torch.zeros(())
    changes = [
        lambda: tensor[None],
        lambda: tensor.flatten(),
        lambda: tensor[:0] if tensor.dim() else tensor,
        lambda: tensor.to(torch.complex64),
        lambda: tensor.to(torch.int8),
        lambda: tensor.to_sparse() if tensor.dim() and not tensor.is_meta else tensor,
        lambda: tensor.to("meta"),
        lambda: torch.full(tensor.shape, float("nan")),
        lambda: tensor.to(torch.float64),
        lambda: torch.cat([tensor, tensor]) if tensor.dim() else tensor,
        lambda: -tensor if tensor.dtype != torch.bool else tensor,
    ]
    return draw.choice(changes)()
