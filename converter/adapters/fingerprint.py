"""Identify a model by a hash of a small fixed sample of its weights, whatever its format, layout or dtype.

Fingerprints differ between models of different shapes, between models trained differently, and between a model and its
fine-tuned version, if training changed some element of the sample; training that changes all elements of one layer does. A
change of a few elements outside the sample is not seen, so equal fingerprints do not prove that two models are the same:
`mbconvert verify` does. Nor are tokenizers, rotary embeddings and `config.json` seen. Values are hashed as fp32: a bf16 model
and its exact copy in fp32 are equal, and a rounded copy is another model. Quantized weights count as the numbers they mean.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from blake3 import blake3

from converter import families, reference, side_files
from converter.config import make_model
from converter.dequantization import dequantized
from converter.families import Family
from converter.hybrid import layout_of
from converter.model import Model
from converter.originals import original_names, with_originals
from converter.plan import Piece, Specs, TensorPlan, check_dtypes, list_names, same_tensor
from converter.planner import huggingface_tensors, to_huggingface
from converter.recognize import refuse_unfit
from converter.rows import RowRange
from converter.rules import Rule, fill
from converter.run import PieceBuffers, in_threads
from converter.side_files import CONFIG, config_of
from converter.sources import open_source
from converter.tables import Tables
from converter.transform import Transform
from formats.detect import open_checkpoint
from formats.disk import user_errors
from formats.errors import UserError
from formats.folder import Folder
from formats.huggingface import HuggingFaceReader, specs_of
from formats.megatron_reader import MegatronReader
from formats.spec import JoinedReader, Reader, Region, RenamedReader, Shape, TensorSpec

ROWS, WIDTH = 16, 256
"""Rows sampled of a matrix, and elements of each row; of a vector, `WIDTH` elements in all."""

WORKERS = 8
"""Threads that read. The sample is thousands of small regions, and a remote source needs a request for each."""


@user_errors()
def fingerprint(source: str | Path | Folder, *, given: Folder | None = None) -> str:
    """Return 64 hexadecimal digits for the model in `source`: a directory of either format, a URL, a Hub id, or a folder.

    `given`: a folder with the `config.json` of a model that has none. Reads headers and at most 16 kB of each weight. Raises
    UserError if `source` is not a model of a supported family.
    """
    if isinstance(source, (str, Path)):
        with closing(open_source(source, or_hub=True)) as folder:
            return fingerprint(folder, given=given)
    reader = open_checkpoint(source, any_dtype=True)
    if isinstance(reader, HuggingFaceReader):
        reader.beside = reader.beside if given is None or reader.beside.has(CONFIG) else given
        config = config_of(reader)
        plain = dequantized(reader, config)
        return _digest(plain, _plan_stored(plain, config, label=source.label))
    return _digest(*_exported(reader, given))


def _plan_stored(reader: Reader, config: Mapping[str, Any], *, label: str) -> list[TensorPlan]:
    """Plan the weights of a Hugging Face model that Megatron stores: without extras, and tied tensors once."""
    plain = families.find(config.get("model_type"))
    family, model = plain.rooted(reader.specs), make_model(plain.CONFIG, config)
    refuse_unfit(reader.specs, config, family, model, label=label)
    shapes = dict(huggingface_tensors(family.RULES, model, reader.specs))
    missing = [name for name in shapes if name not in reader.specs]
    if missing:
        raise UserError(f"`{label}` lacks {list_names(missing)}", hint="is `config.json` of the same model?")
    for name, shape in shapes.items():
        if reader.specs[name].shape != shape:
            raise UserError(
                f"`{name}` has shape {list(reader.specs[name].shape)}, by `config.json` it should be {list(shape)}",
                hint="either the weights or `config.json` are of another model",
            )
    check_dtypes({name: reader.specs[name] for name in shapes})
    return list(_plan_as_everywhere(plain.RULES, family.RULES, model, reader.specs))


def _plan_as_everywhere(plain: Iterable[Rule], own: Iterable[Rule], model: Model, specs: Specs) -> Iterator[TensorPlan]:
    """Plan a source's weights under the names that all sources have here: those of `plain` rules. `own` are the source's, with
    another root or with one tensor of all experts."""
    for (table, indices), (stored, _) in zip(Tables(plain, model), Tables(own, model), strict=True):
        if stored.is_stacked and not table.is_stacked:
            yield from _plan_expert(table.owned_by(indices), specs[fill(stored.names[0], indices)], indices["expert"])
        else:
            for (name, _), (other, _) in zip(table.owned_by(indices), stored.owned_by(indices), strict=True):
                yield same_tensor(replace(specs[other], name=name), specs[other])


def _plan_expert(weights: Iterable[tuple[str, Shape]], stack: TensorSpec, expert: int) -> Iterator[TensorPlan]:
    """Plan an expert's weights, whose rows follow one another in a tensor of all experts."""
    first, transform = 0, Transform(to_megatron=True, stacked=True)
    for name, shape in weights:
        rows = (RowRange(0, first, 0, shape[0]),)
        yield TensorPlan(TensorSpec(name, shape, stack.dtype), (stack,), rows, (expert,), transform)
        first += shape[0]


def _exported(reader: MegatronReader, given: Folder | None) -> tuple[Reader, Sequence[TensorPlan]]:
    """Return the plans of the same weights of a Megatron checkpoint, with the values that an export of it has, and their
    reader."""
    config = reference.find(reader, given, any_settings=True).config
    family = families.find(config.get("model_type"), layout_of(reader.specs))
    model = make_model(family.CONFIG, config)
    plan = to_huggingface(family.RULES, model, reader.specs, dtype="keep")
    reader.check()
    originals = _originals(reader.folder, family, model)
    tensor_plans, tensors = with_originals(plan.tensors, JoinedReader(reader, originals) if originals else reader)
    return tensors, tensor_plans


def _originals(iteration: Folder, family: Family, model: Model) -> Reader | None:
    """Return a reader of the values that weights had before an offset moved them, by the names of the family's rules; None if an
    iteration stores none. It stores them by the names of its source, which may have another root."""
    stored = side_files.load(iteration) if any(rule.offset for rule in family.RULES) else None
    if stored is None or stored.extras is None:
        return None
    extras = HuggingFaceReader(iteration, files=[stored.extras.name], any_dtype=True)
    ours, theirs = (original_names(rules, model) for rules in (family.RULES, family.rooted(specs_of(stored.shards)).RULES))
    names = {name: other for name, other in zip(ours, theirs, strict=True) if other in extras.specs}
    return RenamedReader(extras, names)


def _digest(reader: Reader, tensor_plans: Sequence[TensorPlan]) -> str:
    digests: dict[str, bytes] = {}

    def start() -> Callable[[TensorPlan], None]:
        buffers = PieceBuffers()
        return lambda tensor_plan: digests.update({tensor_plan.spec.name: _hash_sample(reader, tensor_plan, buffers)})

    in_threads(tensor_plans, start, workers=WORKERS)
    return blake3(b"".join(digests[name] for name in sorted(digests))).hexdigest()


def _hash_sample(reader: Reader, tensor_plan: TensorPlan, buffers: PieceBuffers) -> bytes:
    """Return the hash of one tensor's name, shape and sample."""
    spec = tensor_plan.spec
    hasher = blake3(f"{spec.name} {list(spec.shape)}".encode())
    for region in regions(spec.name, spec.shape):
        hasher.update(buffers.make(Piece(tensor_plan, region), reader).astype(np.float32).tobytes())
    return hasher.digest()


def regions(name: str, shape: tuple[int, ...]) -> Iterator[Region]:
    """Yield the sampled regions of a tensor: rows evenly from the first to the last, from a column that the name determines."""
    *before, last = shape
    width = min(last, WIDTH)
    offset = int.from_bytes(blake3(name.encode()).digest(8)) % (last - width + 1)
    part = slice(offset, offset + width)
    if not before:
        yield (part,)
        return
    count = min(before[0], ROWS)
    for number in range(count):
        row = (before[0] - 1) * number // max(count - 1, 1)
        yield slice(row, row + 1), *(slice(0, size) for size in before[1:]), part
