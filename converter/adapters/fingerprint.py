"""Which model is this? A short answer that does not depend on its format, layout or dtype, from a small fixed sample.

It tells apart models of different shapes, models trained differently, and a model from its fine-tuned self, as long as
training moved some element of the sample: one that moves all elements of one layer does. It does not see a change of a few
elements that are not in the sample, so it is no proof that two models are the same: `mbconvert verify` is. Nor does it see
what is no weight: tokenizers, rotary embeddings, `config.json`. Values are compared as fp32, so that a bf16 model and its
exact copy in fp32 are the same, and one that was rounded on the way is another.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import numpy as np
from blake3 import blake3

from converter import families, reference
from converter.config import make_model
from converter.plan import TensorPlan, as_stored, list_names
from converter.planner import huggingface_tensors, to_huggingface
from converter.recognize import refuse_unfit
from converter.run import in_threads
from converter.side_files import CONFIG
from converter.sources import open_source
from formats.detect import open_checkpoint
from formats.disk import user_errors
from formats.errors import UserError
from formats.folder import Folder
from formats.huggingface import HuggingFaceReader
from formats.json_objects import read_json
from formats.megatron_reader import MegatronReader
from formats.spec import Array, Reader, Region, extent

ROWS, WIDTH = 16, 256
"""Rows of a matrix that are looked at, and elements of each; of a vector, `WIDTH` elements in all."""

WORKERS = 8
"""Threads that read: the sample is thousands of small pieces, and a remote source answers each on its own."""


@user_errors()
def fingerprint(source: str | Path | Folder) -> str:
    """64 hexadecimal digits for the model in `source`: a directory of either format, a URL, a Hub id, or a folder.

    Reads headers and at most 16 kB of each weight. Raises UserError for what is no model of a supported family.
    """
    if isinstance(source, (str, Path)):
        with closing(open_source(source, or_hub=True)) as folder:
            return fingerprint(folder)
    reader = open_checkpoint(source)
    tensor_plans = _stored(reader) if isinstance(reader, HuggingFaceReader) else _made(reader)
    return _digest(reader, tensor_plans)


def _stored(reader: HuggingFaceReader) -> list[TensorPlan]:
    """The weights of a Hugging Face model; what Megatron has no place for, or has once where this has it twice, is not asked
    for."""
    config = read_json(reader.folder, CONFIG)
    family = families.find(config.get("model_type")).rooted(reader.specs)
    model = make_model(family.CONFIG, config)
    refuse_unfit(reader.specs, config, family, model, label=reader.folder.label)
    wanted = dict(huggingface_tensors(family.RULES, model, reader.specs))
    missing = [name for name in wanted if name not in reader.specs]
    if missing:
        raise UserError(f"`{reader.folder.label}` lacks {list_names(missing)}", hint="is `config.json` of the same model?")
    for name, shape in wanted.items():
        if reader.specs[name].shape != shape:
            raise UserError(
                f"`{name}` has shape {list(reader.specs[name].shape)}, by `config.json` it should be {list(shape)}",
                hint="either the weights or `config.json` are of another model",
            )
    return list(as_stored({name: reader.specs[name] for name in wanted}).values())


def _made(reader: MegatronReader) -> list[TensorPlan]:
    """The same as a Megatron checkpoint holds them."""
    config = reference.find(reader, None, any_settings=True).config
    family = families.find(config.get("model_type")).rooted(reader.specs)
    plan = to_huggingface(family.RULES, make_model(family.CONFIG, config), reader.specs, dtype="keep")
    reader.check()
    return list(plan.tensors)


def _digest(reader: Reader, tensor_plans: list[TensorPlan]) -> str:
    found: dict[str, bytes] = {}

    def start() -> Callable[[TensorPlan], None]:
        return lambda tensor_plan: found.update({tensor_plan.spec.name: _sample(reader, tensor_plan)})

    in_threads(tensor_plans, start, workers=WORKERS)
    whole = blake3()
    for name in sorted(found):
        whole.update(found[name])
    return whole.hexdigest()


def _sample(reader: Reader, tensor_plan: TensorPlan) -> bytes:
    """A hash of one tensor's name, shape and sample."""
    spec = tensor_plan.spec
    seen = blake3(f"{spec.name} {list(spec.shape)}".encode())
    for region in regions(spec.name, spec.shape):
        seen.update(_read(reader, tensor_plan, region).astype(np.float32).tobytes())
    return seen.digest()


def regions(name: str, shape: tuple[int, ...]) -> Iterator[Region]:
    """The boxes of a tensor that are looked at: rows from the first to the last, each from a place that the name decides on."""
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


def _read(reader: Reader, tensor_plan: TensorPlan, region: Region) -> Array:
    """A box of a tensor, from wherever its rows lie."""
    rows, *rest = region
    out = np.empty(extent(region), tensor_plan.spec.dtype)
    for copy in tensor_plan.copies:
        start, stop = max(rows.start, copy.dst_row), min(rows.stop, copy.dst_row + copy.rows)
        if start < stop:
            shift = copy.src_row - copy.dst_row
            there = (slice(start + shift, stop + shift), *rest)
            reader.read(copy.source, there, out[start - rows.start : stop - rows.start])
    return out
