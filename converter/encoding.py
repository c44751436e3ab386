"""Write quantized weights as they came: codes of a Megatron checkpoint's numbers, under the scales of their source.

That gives the source's bytes as long as every weight is what it was. A model with one that is not is written in plain numbers:
new numbers under old scales would lose what they learned, and a model with both would be misread.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import NamedTuple

from converter import provenance
from converter.dequantization import weights_of
from converter.plan import Piece, TensorPlan, as_stored, pieces
from converter.planned_reader import PlannedReader
from converter.run import PIECE_BYTES, PieceBuffers, in_threads
from converter.side_files import HFReference
from converter.side_tensors import schemes, side_tensor_names
from formats.folder import Folder
from formats.huggingface import specs_of
from formats.quantized.encoded import ChangedError, EncodedReader, stored_name
from formats.quantized.scheme import QuantizedWeight
from formats.spec import JoinedReader, Reader


class Quantized(NamedTuple):
    """What a checkpoint says of the quantized weights that it was made of."""

    weights: Mapping[str, QuantizedWeight]
    """By their plain names."""

    names: Collection[str]
    """All side tensors that they may have."""


def quantized_source(origin: HFReference) -> Quantized:
    """Return the quantized weights that the stored headers of a checkpoint's source describe; none if it was plain."""
    weights = weights_of(specs_of(origin.shards), origin.config)
    return Quantized(weights, side_tensor_names(weights))


def encode(
    tensor_plans: Sequence[TensorPlan], tensors: Reader, quantized: Quantized, folder: Folder, *, workers: int
) -> tuple[Sequence[TensorPlan], Reader, str]:
    """Return the plans of a Hugging Face model's tensors with the weights as they came, their reader, and a note.

    Where the weights are others now, or their scales are not there, the plans and the reader are those that were given.
    `tensors` reads the checkpoint in `folder` and its extras.
    """
    weights = quantized.weights
    planned = {tensor_plan.spec.name: tensor_plan for tensor_plan in tensor_plans if tensor_plan.spec.name in weights}
    missing = [spec.name for weight in weights.values() for spec in weight.side_tensors if spec.name not in tensors.specs]
    other = [name for name in weights if name not in planned or planned[name].spec.dtype != weights[name].spec.dtype]
    if missing or other:
        why = f"`{missing[0]}` is missing" if missing else f"`{other[0]}` was cast"
        return tensor_plans, tensors, f"weights that came quantized are written as plain numbers: {why}"
    encoded = EncodedReader(PlannedReader(tensors, planned), tensors, weights.values())
    if not provenance.is_untouched_import(folder) and (changed := _changed(encoded, workers)):
        return tensor_plans, tensors, f"weights that came quantized are written as plain numbers: {changed}"
    side_tensors = {name: tensors.specs[name] for name in quantized.names & tensors.specs.keys()}
    for weight in weights.values():
        side_tensors.pop(stored_name(weight), None)
    plain = [tensor_plan for tensor_plan in tensor_plans if tensor_plan.spec.name not in weights]
    plans = [*plain, *as_stored({**encoded.specs, **side_tensors}).values()]
    return plans, JoinedReader(tensors, encoded), f"{len(weights)} weights are written as they came: {schemes(weights)}"


def _changed(encoded: EncodedReader, workers: int) -> str:
    """Return which weight is not what it was; nothing if all are. Reads everything, or as far as the first that differs."""

    def start() -> Callable[[Piece], None]:
        buffers = PieceBuffers()

        def check(piece: Piece) -> None:
            buffers.make(piece, encoded)

        return check

    try:
        in_threads(pieces(as_stored(encoded.specs).values(), limit=PIECE_BYTES), start, workers=workers)
    except ChangedError as error:
        return str(error.args[0])
    return ""
