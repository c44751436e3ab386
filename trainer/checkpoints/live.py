"""Load checkpoints of either format into the running model.

Each rank reads only the rows that it holds. Every tensor of the source must be a weight on some rank, and every weight of the
model must have a tensor. The optimizer is not involved.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories

from converter import families, hybrid, reference, run_config
from converter.adapter_files import refuse_adapter
from converter.checks import check_equal
from converter.config import make_model
from converter.consistency import embedding_rows
from converter.dequantization import dequantized
from converter.nemo_config import settings_of
from converter.plan import Piece, TensorPlan, as_stored, list_names
from converter.planner import Plan, to_megatron
from converter.recognize import refuse_unfit
from converter.run import PieceBuffers
from converter.side_files import config_of
from converter.sources import open_source
from converter.spellings import spelled_as
from formats.arrays import bands
from formats.detect import open_checkpoint
from formats.errors import UserError
from formats.folder import LocalFolder
from formats.huggingface import HuggingFaceReader
from formats.megatron_reader import MegatronReader
from formats.spec import Array, Reader, Region, dtype_name, extent, relative_to
from trainer import collectives
from trainer.checkpoints.quantized import in_full
from trainer.dtypes import TORCH_DTYPES
from trainer.model import GPTModelProvider
from trainer.settings import hf_config

Choose = Callable[[dict[str, Any], Any], dict[str, Any]]

PIECE_BYTES = 16 << 20

_EXPERTS = ".experts.experts."
_OF_ML_DTYPES = ("bf16", "fp8_e4m3", "fp8_e5m2")
"""In a key of stacked experts; their names have the expert's number instead of the second word."""


@dataclass(frozen=True, slots=True)
class LocalShard:
    """A shard of a weight on this rank: its region of the global tensor, and its memory. It may have padded vocabulary rows."""

    name: str
    region: Region
    data: torch.Tensor
    global_shape: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Loaded:
    """The result of a load, over all ranks."""

    tensors: int
    of: int
    parameters: int

    def __str__(self) -> str:
        return f"loaded {self.tensors} of {self.of} tensors, {_count(self.parameters)} parameters"


def _count(number: int) -> str:
    for unit, name in ((10**12, "T"), (10**9, "B"), (10**6, "M")):
        if number >= unit:
            return f"{number / unit:.2f} {name}"
    return str(number)


def local_weights(chunks: Sequence[Any], choose: Choose = lambda state, _: state) -> list[LocalShard]:
    """Return every shard of every weight on this rank, under the names of a Megatron checkpoint with a number per layer. `choose`
    selects from a chunk's sharded state."""
    return [local for chunk in chunks for local in _of_state(choose(chunk.sharded_state_dict(), chunk))]


def _of_state(state: dict[str, Any]) -> Iterator[LocalShard]:
    apply_factories(state)
    for leaf in nested_values(state):
        if isinstance(leaf, ShardedTensor):
            yield _local(leaf)


def _local(leaf: ShardedTensor) -> LocalShard:
    """Convert megatron-core's shard. Prepended offsets are the layer of a stacked key, then the expert: both become part of the
    name, as in `formats/torch_dist.py`."""
    stack, _, rest = leaf.key.partition(".layers.")
    stacked = int(leaf.prepend_axis_num > 0 and bool(rest) and not rest[0].isdigit())
    name = f"{stack}.layers.{leaf.global_offset[0]}.{rest}" if stacked else leaf.key
    if leaf.prepend_axis_num > stacked and _EXPERTS in name:
        name, stacked = name.replace(_EXPERTS, f".experts.{leaf.global_offset[stacked]}.", 1), stacked + 1
    data = leaf.data.detach()[(None,) * (leaf.prepend_axis_num - stacked)]
    starts = leaf.global_offset[stacked:]
    region = tuple(slice(start, start + size) for start, size in zip(starts, data.shape, strict=True))
    return LocalShard(name, region, data, tuple(leaf.global_shape[stacked:]))


def load(chunks: Sequence[Any], source: str, *, note: Callable[[str], None] = lambda _: None) -> Loaded:
    """Fill the model from a Hugging Face directory, a Hub id or a Megatron checkpoint.

    `chunks` are not wrapped yet. `note` is called with differences between the model's settings and those that the weights were
    trained with. Raises UserError for tensors that are missing, unused or of another shape, on every rank alike, before a weight
    changes.
    """
    folder = open_source(source, or_hub=True)
    refuse_adapter(folder)
    with in_full(chunks), closing(open_checkpoint(folder, any_dtype=True)) as reader:
        refuse_adapter(reader.folder)
        locals_ = local_weights(chunks)
        vocab = getattr(chunks[0].config, "vocab_size", None)
        config = _hf_config(reader, vocab)
        layout = getattr(chunks[0].config, "layout", None)
        tensors, tensor_plans = (
            _from_huggingface(reader, layout)
            if isinstance(reader, HuggingFaceReader)
            else (reader, _in_layout(layout, _from_megatron(reader, _tokens(config, vocab))))
        )
        names = _names(locals_)
        tensor_plans = {spelled_as(names, name): tensor_plan for name, tensor_plan in tensor_plans.items()}
        check_names_and_shapes(locals_, tensor_plans, source)
        if config and getattr(chunks[0].config, "hf_config", None):
            for text in hf_config.compare(chunks[0].config, config, source=source):
                note(text)
        for text in (*_by_settings(reader, chunks[0].config, source), *_rows_left_out(reader, config, vocab, source)):
            note(text)
        for local in locals_:
            fill(local, tensor_plans[local.name], tensors)
        return _loaded(tensor_plans, tensors)


def _hf_config(reader: HuggingFaceReader | MegatronReader, vocab: int | None) -> Mapping[str, Any] | None:
    """Return the `config.json` of a source; None for a checkpoint that does not describe its model. `vocab` is the model's own
    vocabulary size, for a checkpoint that has only the padded size."""
    if isinstance(reader, HuggingFaceReader):
        return config_of(reader)
    try:
        return reference.find(reader, None, any_settings=True, vocab=vocab).config
    except reference.UnknownModelError:
        return None


def _by_settings(reader: HuggingFaceReader | MegatronReader, provider: Any, source: str) -> list[str]:
    """Return the differences between a GPT's settings and those of a checkpoint that no `config.json` can hold."""
    if not isinstance(provider, GPTModelProvider):
        return []
    saved = [] if isinstance(reader, HuggingFaceReader) else settings_of(reader)
    return hf_config.compare_settings(provider, saved[0].settings if saved else {}, source=source)


def settings_changed(chunks: Sequence[Any], resumed: Path) -> list[str]:
    """Return the differences between a GPT's settings and those of the checkpoint that its run resumes, as text. Raises UserError
    for a setting that the run lacks."""
    folder, provider = LocalFolder(resumed), chunks[0].config
    saved = run_config.read_all(folder, {}) if isinstance(provider, GPTModelProvider) else []
    return hf_config.compare_settings(provider, saved[0].settings, source=str(resumed)) if saved else []


def plan_of(reader: HuggingFaceReader) -> Plan:
    """Return the plan that makes a Megatron model without padding from a directory's tensors, as plain numbers."""
    config = config_of(reader)
    return _plan(dequantized(reader, config), config, label=reader.folder.label)


def _plan(tensors: Reader, config: Mapping[str, Any], layout: str | None = None, *, label: str) -> Plan:
    family = families.find(config.get("model_type"), layout).rooted(tensors.specs)
    model, passing = make_model(family.CONFIG, config), family.PASSTHROUGH_PREFIXES
    refuse_unfit(tensors.specs, config, family, model, label=label)
    return to_megatron(family.RULES, family.EXTRAS, model, tensors.specs, dtype="keep", passing=passing)


def _from_huggingface(reader: HuggingFaceReader, layout: str | None) -> tuple[Reader, dict[str, TensorPlan]]:
    """Return a reader of a directory's tensors as plain numbers, and the plan for each of Megatron's in a layout. Rank 0 compares
    those that must be equal, which all ranks would read whole."""
    config = config_of(reader)
    tensors = dequantized(reader, config)
    plan = _plan(tensors, config, layout, label=reader.folder.label)

    def compare() -> None:
        for name, other in plan.equal:
            check_equal(tensors, name, other)

    collectives.from_first_rank(compare)
    return tensors, {tensor_plan.spec.name: tensor_plan for tensor_plan in plan.tensors}


def _tokens(config: Mapping[str, Any] | None, vocab: int | None) -> int | None:
    """Return the number of tokens of a checkpoint: by its `config.json`, else that of the model that is filled."""
    return make_model(families.find(config.get("model_type")).CONFIG, config).vocab if config else vocab


def _rows_left_out(
    reader: HuggingFaceReader | MegatronReader, config: Mapping[str, Any] | None, vocab: int | None, source: str
) -> Iterator[str]:
    """Yield a note if only the model that is filled says which rows of a checkpoint's vocabulary are tokens."""
    rows = embedding_rows(reader.specs)
    if config is None and vocab and rows and rows > vocab:
        yield f"`{source}` does not say how many of its {rows} rows are tokens: those after the model's {vocab} are left out"


def _from_megatron(reader: MegatronReader, vocab: int | None) -> dict[str, TensorPlan]:
    """Return the plan for a checkpoint's tensors, without the rows that pad the vocabulary where its size is known."""
    reader.check(reader.specs)
    tensor_plans = as_stored(reader.specs)
    return {name: _unpadded(tensor_plan, vocab) if _padded(name) else tensor_plan for name, tensor_plan in tensor_plans.items()}


def _in_layout(layout: str | None, tensor_plans: dict[str, TensorPlan]) -> dict[str, TensorPlan]:
    """Return the plans for a checkpoint's tensors under their names in a layout, where the checkpoint has the other."""
    if layout is None or layout == hybrid.layout_of(tensor_plans):
        return tensor_plans
    renamed = hybrid.in_hybrid if layout == hybrid.HYBRID else hybrid.in_gpt
    return {renamed(name): tensor_plan for name, tensor_plan in tensor_plans.items()}


def _padded(name: str) -> bool:
    return name in {"embedding.word_embeddings.weight", "output_layer.weight", "output_layer.bias"}


def _unpadded(tensor_plan: TensorPlan, vocab: int | None) -> TensorPlan:
    rows = tensor_plan.spec.shape[0] if vocab is None else min(vocab, tensor_plan.spec.shape[0])
    return replace(tensor_plan, ranges=tuple(replace(part, rows=rows) for part in tensor_plan.ranges))


def _names(locals_: Sequence[LocalShard]) -> set[str]:
    """Return the names of the whole model's weights, of which each rank holds some."""
    everywhere: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everywhere, {local.name for local in locals_})
    return set[str]().union(*everywhere)


_OTHER = "the weights are of another model than `model` describes; no weight is left random"


def check_names_and_shapes(
    locals_: Sequence[LocalShard], tensor_plans: Mapping[str, TensorPlan], source: str, *, hint: str = _OTHER
) -> None:
    """Raise UserError, on all ranks alike, unless both sides hold the same names and shapes."""
    shapes: dict[str, tuple[int, ...]] = {}
    everywhere: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everywhere, {local.name: local.global_shape for local in locals_})
    for of_rank in everywhere:
        shapes |= of_rank
    missing, over = sorted(shapes.keys() - tensor_plans.keys()), sorted(tensor_plans.keys() - shapes.keys())
    if missing:
        raise UserError(f"`{source}` lacks {list_names(missing)}, which the model has", hint=hint)
    if over:
        raise UserError(f"`{source}` holds {list_names(over)}, which the model does not have", hint=hint)
    for name, shape in shapes.items():
        stored = tensor_plans[name].spec.shape
        fits = stored[1:] == shape[1:] and (stored[0] == shape[0] or (_padded(name) and _rows(tensor_plans[name]) <= shape[0]))
        if not fits:
            raise UserError(f"`{name}` has shape {list(stored)} in `{source}`, in the model {list(shape)}", hint=hint)


def _rows(tensor_plan: TensorPlan) -> int:
    return max((part.dst_row + part.rows for part in tensor_plan.ranges), default=0)


@torch.no_grad()
def fill(local: LocalShard, tensor_plan: TensorPlan, reader: Reader) -> None:
    """Copy the rows of each of the plan's sources into the shard; rows without a source become the plan's `fill`."""
    buffers, rows = PieceBuffers(), local.region[0]
    for band in bands(rows, _step(local, tensor_plan.spec.dtype)):
        data = buffers.make(Piece(tensor_plan, (band, *local.region[1:])), reader)
        (inside,) = relative_to((band,), (rows,))
        local.data[inside].copy_(as_tensor(data))


def _step(local: LocalShard, dtype: np.dtype[Any]) -> int:
    row_bytes = prod(extent(local.region)[1:]) * dtype.itemsize
    return max(1, PIECE_BYTES // max(row_bytes, 1))


def as_tensor(data: Array) -> torch.Tensor:
    """Return a tensor of the same memory. torch has numpy's dtypes, but not the 8 and 16 bit floats of ml_dtypes."""
    name = dtype_name(data.dtype)
    if name not in _OF_ML_DTYPES:
        return torch.from_numpy(data)
    return torch.from_numpy(data.view(f"u{data.dtype.itemsize}")).view(TORCH_DTYPES[name])


def _loaded(tensor_plans: Mapping[str, TensorPlan], reader: Reader) -> Loaded:
    read = {name for tensor_plan in tensor_plans.values() for name in tensor_plan.sources}
    parameters = sum(prod(reader.specs[name].shape) for name in read)
    return Loaded(tensors=len(read), of=len(reader.specs), parameters=parameters)
