"""The parameters of a model as its ranks hold them: which chunks of the weights' keys each is made of.

A rank's parameter is one chunk of a key, or several one after the other: a gated `linear_fc1` is the rank's gates and then what
they multiply, each a chunk. Names and numbers are those of `torch_dist.py`, orders those of `registration.py`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from math import prod

import numpy as np

from formats.container import Container
from formats.errors import UserError
from formats.spec import Array
from formats.torch_dist import GATE, UP

EMBEDDING = "embedding.word_embeddings.weight"
OUTPUT = "output_layer.weight"

_LAYER = re.compile(r"(.*?\blayers)\.(?:(\d+)\.)?(.+)")
_EXPERT = re.compile(r"(.*\bexperts)\.(?:experts|(\d+))\.(.+)")
_BUFFERS = re.compile(r".*\.router\.expert_bias")
"""What is stored beside the weights and not trained by the optimizer."""

Piece = tuple[str, int]
"""A key, and the number of one of its chunks."""


@dataclass(frozen=True, slots=True)
class Parameter:
    """A weight of the model: `stack` is what counts its layers (`decoder.layers`), empty for one outside, `name` its name in
    the layer, without the number of its expert. Both numbers are -1 where there is none."""

    stack: str
    layer: int
    name: str
    expert: int
    pieces: tuple[tuple[Piece, ...], ...]
    """The chunks that it is made of on each tensor-parallel rank; one entry where all ranks hold the same."""

    sizes: tuple[int, ...]
    """Its number of elements on each of these."""

    def size(self, rank: int) -> int:
        return self.sizes[rank % len(self.sizes)]


def tensor_parallel_size(container: Container, root: str) -> int:
    """Return over how many ranks the embedding is divided."""
    if root + EMBEDDING not in set(container.tensor_names):
        raise UserError(
            f"the checkpoint has no `{root}{EMBEDDING}`, whose chunks say over how many ranks the model is divided",
            hint="load it in Megatron and save it with `--dist-ckpt-optim-fully-reshardable`",
        )
    return len(container.tensor(root + EMBEDDING))


def expert_tensor_parallel_size(container: Container, root: str, keys: Iterable[str]) -> int:
    """Return over how many ranks an expert is divided, 1 where there is none."""
    for key in keys:
        match = _EXPERT.fullmatch(key)
        if match and match[3] == "linear_fc2.weight":
            return max(len(chunks) for _, chunks in _rows(container, root + key))
    return 1


def read_parameters(container: Container, root: str, keys: Iterable[str], *, ranks: int, expert_ranks: int) -> list[Parameter]:
    """Return the parameters of the model, in the order of `keys`, its weights without `root`.

    Raises UserError for a weight whose chunks are not those of that many tensor-parallel ranks.
    """
    known = dict.fromkeys(keys)
    read = list[Parameter]()
    for key in known:
        second = key.removesuffix(GATE) + UP if key.endswith(GATE) else ""
        is_second = key.endswith(UP) and key.removesuffix(UP) + GATE in known
        if is_second or _BUFFERS.fullmatch(key):
            continue
        both = [root + key, root + second] if second in known else [root + key]
        name = key.removesuffix(GATE) if second in known else key
        read += _of_key(container, both, name, expert_ranks if _EXPERT.fullmatch(key) else ranks)
    return read


def _of_key(container: Container, keys: list[str], name: str, ranks: int) -> Iterator[Parameter]:
    """Yield the parameters of a weight's key or of its two halves: one for each layer and expert that it stacks."""
    layer = _LAYER.fullmatch(name)
    stack, inner = (layer[1], layer[3]) if layer else ("", name)
    expert = _EXPERT.fullmatch(inner)
    short = f"{expert[1]}.{expert[3]}" if expert else inner
    for rows in zip(*(_rows(container, key) for key in keys), strict=True):
        numbers = list(rows[0][0])
        number = int(layer[2]) if layer and layer[2] else numbers.pop(0) if layer else -1
        of_expert = int(expert[2]) if expert and expert[2] else numbers.pop(0) if expert else -1
        pieces = _pieces(container, [(key, chunks) for key, (_, chunks) in zip(keys, rows, strict=True)], ranks)
        sizes = tuple(sum(elements(container, piece) for piece in held) for held in pieces)
        yield Parameter(stack, number, short, of_expert, pieces, sizes)


def elements(container: Container, piece: Piece) -> int:
    """Return how many elements a chunk has."""
    key, number = piece
    return prod(part.stop - part.start for part in container.tensor(key).region(number))


def stacked_axes(key: str) -> int:
    """Return how many axes of a key count layers and experts."""
    layer = _LAYER.fullmatch(key)
    expert = _EXPERT.fullmatch(layer[3] if layer else key)
    return int(layer is not None and not layer[2]) + int(expert is not None and not expert[2])


def _rows(container: Container, key: str) -> Iterator[tuple[tuple[int, ...], list[int]]]:
    """Yield the rows of a key that are weights: their numbers, and their chunks in the order of these in the weight."""
    axes = stacked_axes(key)
    shape, starts, sizes = container.tensor(key).bounds()
    if len(shape) < axes or (sizes[:, :axes] != 1).any():
        raise _cut(key, "chunks of several layers or experts")
    order = np.lexsort(starts.T[::-1]) if shape else np.arange(len(starts))
    rows: dict[tuple[int, ...], list[int]] = {}
    for number, row in zip(order.tolist(), starts[order, :axes].tolist(), strict=True):
        rows.setdefault(tuple(row), []).append(number)
    for row, chunks in rows.items():
        if _cut_axes(starts[chunks][:, axes:]) > 1:
            raise _cut(key, "chunks along several axes")
        yield row, chunks


def _cut_axes(starts: Array) -> int:
    """Return along how many axes chunks follow one another."""
    return int((starts != starts[:1]).any(axis=0).sum())


def _pieces(container: Container, parts: list[tuple[str, list[int]]], ranks: int) -> tuple[tuple[Piece, ...], ...]:
    """Return the chunks of one weight that each rank holds, of both its halves. One chunk is the same on all ranks."""
    if all(len(chunks) == 1 for _, chunks in parts):
        return (tuple((key, chunks[0]) for key, chunks in parts),)
    for key, chunks in parts:
        starts = container.tensor(key).bounds()[1][chunks][:, stacked_axes(key) :]
        if len(chunks) % ranks or (len(chunks) > ranks and (starts[:, 1:] != starts[:1, 1:]).any()):
            raise _cut(key, f"{len(chunks)} chunks, which are not those of {ranks} ranks")
    return tuple(tuple((key, chunk) for key, chunks in parts for chunk in chunks[rank::ranks]) for rank in range(ranks))


def _cut(key: str, what: str) -> UserError:
    return UserError(
        f"`{key}` is stored in {what}: it is not known where its optimizer state is",
        hint="load it in Megatron and save it with `--dist-ckpt-optim-fully-reshardable`",
    )
