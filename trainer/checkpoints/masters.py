"""Compare the fp32 masters of a loaded optimizer state with the weights.

A step rounds masters to weights, to nearest even. So a master that does not round to its weight, bit for bit, was written wrong,
and its moments too (see `bucket_padding`). Weights in fp32 are their own masters; if the optimizer's state holds them a second
time, both must be equal.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from formats.detect import open_megatron
from formats.errors import UserError
from formats.folder import LocalFolder
from trainer import optim
from trainer.checkpoints import live
from trainer.dtypes import DTYPE_NAMES
from trainer.model import unwrap

_CAST = "weights that are in another dtype there"
_ONCE = "fp32 weights, which `dp_reshardable` state is read into"


@dataclass(frozen=True, slots=True)
class _Pair:
    """A weight, the range of its elements whose master this rank holds, and that master, flat."""

    weight: torch.Tensor
    elements: slice
    master: torch.Tensor | None

    @property
    def part(self) -> torch.Tensor:
        """The elements of the weight that the master is of, `[elements]`."""
        return self.weight.detach().reshape(-1)[self.elements]

    @property
    def obstacle(self) -> str:
        """Why the two cannot be compared; empty if they can."""
        if type(self.weight.data) is not torch.Tensor:
            return "weights in 8 or 4 bits"
        if self.master is None or self.master.dtype != torch.float32:
            return "masters that `optimizer.use_precision_aware_optimizer` keeps in a form of its own"
        return ""

    @property
    def agrees(self) -> bool:
        """Whether the master rounds to the weight, bit for bit."""
        assert self.master is not None
        bits = {2: torch.int16, 4: torch.int32}[self.weight.element_size()]
        return torch.equal(self.master.to(self.weight.dtype).view(bits), self.part.view(bits))


@contextmanager
def compared_with_weights(
    chunks: list[Any], optimizer: Any, folder: Path, *, peft: Any, sharding: str, say: Callable[[str], None]
) -> Iterator[None]:
    """Compare fp32 masters with weights when this context is left. Inside it, the caller loads the optimizer's state from the
    checkpoint `folder`, whose weights the model has already.

    Passes a note on weights that could not be compared to `say`. Raises UserError, on all ranks alike, for a master that does
    not round to its weight.
    """
    fp32_pairs = list(_own_masters(optimizer))
    copies = (
        [_Pair(pair.weight, pair.elements, pair.part.clone()) for pair in fp32_pairs] if sharding == "fully_reshardable" else []
    )
    yield
    pairs = [*_pairs(optimizer), *copies]
    skipped = {pair.obstacle for pair in pairs if pair.obstacle}
    skipped |= {_ONCE} if fp32_pairs and not copies else set()
    skipped |= {"frozen weights"} if peft is None and _some_frozen(chunks) else set()
    wrong = [pair.weight for pair in pairs if not pair.obstacle and not pair.agrees]
    own_names, other_dtype = _names(wrong, chunks, folder) if wrong else (set(), set())
    names, reasons = _of_all_ranks(own_names), _of_all_ranks(skipped | other_dtype)
    if names:
        raise _written_wrong(names, folder, adapters=peft is not None)
    if reasons:
        say(f"note: weights of `{folder}` that were not held against fp32 masters: {', '.join(reasons)}")


def _of_all_ranks(texts: set[str]) -> list[str]:
    everywhere: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everywhere, texts)
    return sorted(set().union(*everywhere))


def _pairs(optimizer: Any) -> Iterator[_Pair]:
    """Yield weights in 16 bits or fewer, and their masters."""
    for part in optim.distributed(optimizer):
        for weight, master in _zipped(part.model_float16_groups, part.shard_fp32_from_float16_groups):
            yield _Pair(weight, _range(part, weight), master)
    for part in optim.unsharded(optimizer):
        for weight, master in _zipped(part.float16_groups, part.fp32_from_float16_groups):
            yield _Pair(weight, slice(None), master.detach().reshape(-1))


def _own_masters(optimizer: Any) -> Iterator[_Pair]:
    """Yield weights in fp32 of distributed optimizers, which save them a second time."""
    for part in optim.distributed(optimizer):
        for weight, shard in _zipped(part.model_fp32_groups, part.shard_fp32_groups):
            yield _Pair(weight, _range(part, weight), shard)


def _range(optimizer: Any, weight: torch.Tensor) -> slice:
    elements = optimizer._get_model_param_range_map(weight)["param"]
    return slice(elements.start, elements.end)


def _zipped(weights: Iterable[Any], masters: Iterable[Any]) -> Iterator[tuple[Any, Any]]:
    for group, masters_of_group in zip(weights, masters, strict=True):
        yield from zip(group, masters_of_group, strict=True)


def _some_frozen(chunks: list[Any]) -> bool:
    return not all(parameter.requires_grad for chunk in chunks for parameter in chunk.parameters())


def _names(wrong: list[torch.Tensor], chunks: list[Any], folder: Path) -> tuple[set[str], set[str]]:
    """Return the names of these weights in the checkpoint, and why others of them may differ.

    Vocabulary rows that only this run pads do not differ: megatron-core fills weights and masters with zeros.
    """
    by_address = {local.data.data_ptr(): local for local in live.local_weights([unwrap(chunk) for chunk in chunks])}
    names, other_dtype = set[str](), set[str]()
    with closing(open_megatron(LocalFolder(folder))) as reader:
        for weight in wrong:
            local = by_address.get(weight.data_ptr())
            stored = reader.specs.get(local.name) if local else None
            if local is None or stored is None:
                names.add(f"a weight of shape {list(weight.shape)}")
            elif stored.stored_dtype != DTYPE_NAMES[weight.dtype]:
                other_dtype.add(_CAST)
            else:
                names.add(local.name)
    return names, other_dtype


def _written_wrong(names: list[str], folder: Path, *, adapters: bool) -> UserError:
    others = f", and those of {len(names) - 1} more do not" if len(names) > 1 else ""
    setting = "pretrained_adapter" if adapters else "pretrained_checkpoint"
    return UserError(
        f"`{folder}` was written wrong: the fp32 master of `{names[0]}` does not round to the weight{others}",
        hint="its weights are whole, its optimizer state is not (megatron-core 0.15 to 0.19.2 could shift it); start from the "
        f"weights: `checkpoint.{setting}={folder}` with another `checkpoint.save`",
    )
