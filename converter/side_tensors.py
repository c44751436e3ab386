"""Side tensors of a quantized source: its scales, and the codes that numbers and scales do not determine.

A checkpoint stores them next to the dequantized weights, so that an export can write the same bytes again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

from converter.run import in_threads
from formats.quantized.encoded import comes_back, stored_name
from formats.quantized.reader import DequantizedReader
from formats.quantized.scheme import QuantizedWeight
from formats.spec import Reader, RenamedReader


def open_side_tensors(reader: Reader, kept: Iterable[str] = ()) -> Reader | None:
    """Return a reader of the side tensors of `reader`; None if its weights are not quantized. `kept` are the weights whose codes
    are stored unchanged."""
    if not isinstance(reader, DequantizedReader):
        return None
    codes = {stored_name(weight): weight.codes.name for weight in (reader.weights[name] for name in kept)}
    return RenamedReader(reader.raw, {**{name: name for name in reader.side_tensors}, **codes})


def side_tensor_names(weights: Mapping[str, QuantizedWeight]) -> set[str]:
    """Return the names of all side tensors that these weights may have."""
    return {name for weight in weights.values() for name in (stored_name(weight), *(spec.name for spec in weight.side_tensors))}


def kept_weights(reader: DequantizedReader, *, workers: int) -> list[str]:
    """Return the weights whose codes cannot be made again from numbers and scales. Reads all scales, and few codes.

    Raises UserError for scales that are not finite.
    """
    kept = set[str]()

    def start() -> Callable[[QuantizedWeight], None]:
        return lambda weight: None if comes_back(weight, reader.raw) else kept.add(weight.spec.name)

    in_threads(reader.weights.values(), start, workers=workers)
    return [name for name in reader.weights if name in kept]


def schemes(weights: Mapping[str, QuantizedWeight]) -> str:
    """Return how weights are quantized, in words."""
    return ", ".join(sorted({weight.scheme.name for weight in weights.values()}))
