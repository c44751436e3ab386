"""Choose how a model's quantized weights are read, by the `quantization_config` of its `config.json`.

Weights in FP8, MXFP4 and packed INT4 are presented as plain ones, so families know nothing of quantization. Every scale has to
belong to a weight, with the shape that the configuration gives it. Other methods are refused in converter/quantization.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import cache
from typing import Any, cast

import numpy as np

from converter.plan import list_names
from converter.torchtitan import translated
from formats.errors import UserError, format_untrusted
from formats.quantized.fp8 import Fp8
from formats.quantized.int4 import PACKED, PackedInt4
from formats.quantized.mxfp4 import BYTES, GROUP, Mxfp4
from formats.quantized.reader import DequantizedReader
from formats.quantized.scheme import BF16, QuantizedWeight
from formats.spec import DTYPES, Reader, Shape, TensorSpec, dtype_name, is_size

Specs = Mapping[str, TensorSpec]
Settings = Mapping[str, Any]

_FIELDS = ("quantization_config", "compression_config")
_FP8 = (DTYPES["fp8_e4m3"], DTYPES["fp8_e5m2"])
_SCALE_DTYPES = ("fp32", "bf16", "fp16", "uint8", "fp8_e8m0")
_DAMAGED = "either the weights or `config.json` are of another model, or a file was not fetched"


def dequantized(reader: Reader, config: Mapping[str, Any]) -> Reader:
    """Return a reader of the weights as plain numbers under transformers' names; `reader` itself if they are that, or quantized
    by an unknown method.

    Raises UserError for a weight without scales, for scales without a weight, and for scales of another shape.
    """
    reader = translated(reader, config)
    weights = weights_of(reader.specs, config)
    return DequantizedReader(reader, weights) if weights else reader


def weights_of(specs: Specs, config: Mapping[str, Any]) -> dict[str, QuantizedWeight]:
    """Return the quantized weights among tensors, by their plain names; none if they are plain, or of an unknown method.

    Raises UserError for a weight without scales, for scales without a weight, and for scales of another shape.
    """
    settings = settings_of(config)
    find = _METHODS.get(str(settings.get("quant_method"))) if settings else None
    if settings is None or find is None:
        return {}
    weights = {weight.spec.name: weight for weight in find(specs, settings)}
    if weights:
        _check_ignored(weights.values(), settings)
        _check_complete(specs, weights)
    return weights


def settings_of(config: Mapping[str, Any]) -> Settings | None:
    """Return what a `config.json` says of quantization, there or in its `text_config`; None if it says nothing."""
    for holder in (config, config.get("text_config")):
        for name in _FIELDS if isinstance(holder, Mapping) else ():
            value = cast("Mapping[str, Any]", holder).get(name)
            if isinstance(value, dict):
                return cast("Settings", value)
    return None


def _fp8(specs: Specs, settings: Settings) -> Iterator[QuantizedWeight]:
    """Yield the weights of transformers' `fp8`, with the names of scales that Mistral's releases have too."""
    block = _block_size(settings.get("weight_block_size", [128, 128]), "weight_block_size")
    for spec in [spec for spec in specs.values() if spec.dtype in _FP8]:
        scales = _required(specs, spec, ("weight_scale_inv", "qscale_weight", "weight_scale"))
        yield _fp8_weight(specs, spec, scales, block)


def _fp8_weight(specs: Specs, spec: TensorSpec, scales: TensorSpec, block: tuple[int, int] | None) -> QuantizedWeight:
    _check_scale_dtype(scales)
    others = [specs[name] for name in _named(spec.name, _ACTIVATIONS) if name in specs]
    scheme = _fp8_scheme(spec.shape, spec.dtype, scales.shape, block)
    if scheme is None:
        of = f"blocks of {block[0]} x {block[1]}" if block else "one for the tensor or one for each row"
        raise UserError(
            f"`{scales.name}` has shape {list(scales.shape)}, which is not that of {of} of `{spec.name}`, {list(spec.shape)}",
            hint=_DAMAGED,
        )
    return QuantizedWeight(spec.cast(_plain_dtype(scales)), spec, (scales,), scheme, others=tuple(others))


@cache
def _fp8_scheme(shape: Shape, dtype: np.dtype[Any], scales: Shape, block: tuple[int, int] | None) -> Fp8 | None:
    """Return how a weight with scales of that shape is read; None if no grid of scales fits."""
    if len(shape) < 2:
        return None
    *outer, rows, columns = shape
    if block:
        grid = (*outer, -(-rows // block[0]), -(-columns // block[1]))
        return Fp8(f"FP8 in blocks of {block[0]} x {block[1]}", dtype, block, scales) if scales == grid else None
    if scales == (*outer, 1, 1) or (scales in ((), (1,)) and not outer):
        return Fp8("FP8 with a scale for each tensor", dtype, (rows, columns), scales)
    if scales == (*outer, rows, 1) or (scales == (rows,) and not outer):
        return Fp8("FP8 with a scale for each row", dtype, (1, columns), scales)
    return None


def _mxfp4(specs: Specs, settings: Settings) -> Iterator[QuantizedWeight]:  # noqa: ARG001 - of all methods
    """Yield the experts of GPT-OSS: `*_blocks` with their `*_scales`."""
    for codes in [spec for spec in specs.values() if spec.name.endswith("_blocks")]:
        plain = codes.name.removesuffix("_blocks")
        scales = _existing(specs, codes, [f"{plain}_scales"])
        if len(codes.shape) != 4 or codes.shape[-1] != BYTES or codes.stored_dtype != "uint8":
            raise UserError(
                f"`{codes.name}` is {codes.stored_dtype} of shape {list(codes.shape)}, which is not [experts, out, in / 32, 16] "
                "in uint8",
                hint=_DAMAGED,
            )
        if scales.shape != codes.shape[:-1] or scales.stored_dtype not in ("uint8", "fp8_e8m0"):
            raise UserError(
                f"`{scales.name}` is {scales.stored_dtype} of shape {list(scales.shape)}, for `{codes.name}` it should be uint8 "
                f"of {list(codes.shape[:-1])}",
                hint=_DAMAGED,
            )
        experts, rows, groups, _ = codes.shape
        yield QuantizedWeight(TensorSpec(plain, (experts, groups * GROUP, rows), BF16), codes, (scales,), Mxfp4())


def _compressed_tensors(specs: Specs, settings: Settings) -> Iterator[QuantizedWeight]:
    """Yield the weights of compressed-tensors: FP8, and INT4 in `weight_packed`."""
    kinds = _kinds(settings)
    for spec in specs.values():
        if spec.dtype in _FP8 and "float" in kinds:
            scales = _required(specs, spec, ("weight_scale",))
            block = _block_size(kinds["float"].get("block_structure"), "block_structure")
            yield _fp8_weight(specs, spec, scales, block)
        elif spec.name.endswith(".weight_packed") and "int" in kinds:
            yield _packed_weight(specs, spec, kinds["int"])


def _kinds(settings: Settings) -> dict[str, Settings]:
    """Return the kinds of weights that the groups of a configuration have, each with its settings: `float` of 8 bits, and `int`
    of 4 bits. Kinds that are not read are left out: the names of their tensors are refused."""
    groups, kinds = settings.get("config_groups"), dict[str, Settings]()
    for group in cast("dict[str, Any]", groups).values() if isinstance(groups, dict) else ():
        weights = cast("dict[str, Any]", group).get("weights") if isinstance(group, dict) else None
        if not isinstance(weights, dict):
            continue
        read = cast("Settings", weights)
        if (read.get("type", "int"), read.get("num_bits", 8)) not in (("float", 8), ("int", 4)):
            continue
        kind = str(read.get("type", "int"))
        if kind in kinds and _grid_of(kinds[kind]) != _grid_of(read):
            raise UserError(
                f"`quantization_config` has groups of {kind} weights with different grids of scales: {_grid_of(kinds[kind])} and "
                f"{_grid_of(read)}",
                hint="convert the original weights (bf16), from which it was made",
            )
        kinds[kind] = read
    return kinds


def _grid_of(weights: Settings) -> dict[str, str]:
    return {name: format_untrusted(weights.get(name)) for name in ("strategy", "group_size", "block_structure", "symmetric")}


def _packed_weight(specs: Specs, codes: TensorSpec, settings: Settings) -> QuantizedWeight:
    """Return a weight of packed INT4. Its columns are as many as its groups have, or as the codes hold."""
    module = codes.name.removesuffix("weight_packed")
    scales = _existing(specs, codes, [f"{module}weight_scale"])
    _check_scale_dtype(scales)
    group = settings.get("group_size") if settings.get("strategy") == "group" else codes.shape[-1] * PACKED
    if not isinstance(group, int) or not is_size(group) or group < 1:
        raise UserError(f"`group_size` in `quantization_config` is `{format_untrusted(group)}`", hint=_DAMAGED)
    shape = (*codes.shape[:-1], scales.shape[-1] * group if scales.shape else 0)
    fits = len(shape) >= 2 and scales.shape[:-1] == codes.shape[:-1] and -(-shape[-1] // PACKED) == codes.shape[-1]
    if codes.stored_dtype != "int32" or not fits:
        raise UserError(
            f"`{scales.name}` has shape {list(scales.shape)}, which is not that of groups of {group} columns of `{codes.name}`, "
            f"{codes.stored_dtype} of {list(codes.shape)}",
            hint=_DAMAGED,
        )
    parameters, points = (scales,), not settings.get("symmetric", True)
    if points:
        parameters = (scales, _zero_points(specs, codes, scales, module))
    stored = specs.get(f"{module}weight_shape")
    plain = TensorSpec(f"{module}weight", shape, _plain_dtype(scales))
    others = [specs[name] for name in _named(plain.name, _ACTIVATIONS) if name in specs]
    return QuantizedWeight(plain, codes, parameters, _packed_scheme(shape, group, points), stored, tuple(others))


def _zero_points(specs: Specs, codes: TensorSpec, scales: TensorSpec, module: str) -> TensorSpec:
    points = _existing(specs, codes, [f"{module}weight_zero_point"])
    *outer, rows, groups = scales.shape
    expected = (*outer, -(-rows // PACKED), groups)
    if points.shape != expected or points.stored_dtype != "int32":
        raise UserError(
            f"`{points.name}` is {points.stored_dtype} of shape {list(points.shape)}, for `{scales.name}` it should be int32 of "
            f"{list(expected)}",
            hint=_DAMAGED,
        )
    return points


@cache
def _packed_scheme(shape: Shape, group: int, zero_points: bool) -> PackedInt4:
    return PackedInt4(shape, group, zero_points)


_METHODS: dict[str, Callable[[Specs, Settings], Iterator[QuantizedWeight]]] = {
    "fp8": _fp8,
    "mxfp4": _mxfp4,
    "compressed-tensors": _compressed_tensors,
}

_ACTIVATIONS = ("activation_scale", "qscale_act", "input_scale")
"""Scales of a module's input: they change no weight."""

_SCALES = (*_ACTIVATIONS, "weight_scale_inv", "qscale_weight", "weight_scale", "weight_shape", "weight_zero_point", "_scales")


def _named(weight: str, names: Iterable[str]) -> list[str]:
    """Return the names that tensors of a weight's module may have. Fused experts have no `weight`: its name is the prefix."""
    if weight.endswith(".weight") or weight == "weight":
        return [weight.removesuffix("weight") + name for name in names]
    return [f"{weight}_{name.removeprefix('weight_')}" for name in names]


def _required(specs: Specs, spec: TensorSpec, names: Iterable[str]) -> TensorSpec:
    return _existing(specs, spec, _named(spec.name, names))


def _existing(specs: Specs, weight: TensorSpec, names: list[str]) -> TensorSpec:
    """Return the tensor of a weight that has one of these names. Raises UserError if there is none."""
    for name in names:
        if name in specs:
            return specs[name]
    raise UserError(f"`{weight.name}` is {weight.stored_dtype} and its `{names[0]}` is missing", hint=_DAMAGED)


def _check_scale_dtype(scales: TensorSpec) -> None:
    if scales.stored_dtype not in _SCALE_DTYPES:
        raise UserError(
            f"`{scales.name}` is {scales.stored_dtype}, and scales are {', '.join(_SCALE_DTYPES)}",
            hint=_DAMAGED,
        )


def _plain_dtype(scales: TensorSpec) -> np.dtype[Any]:
    """Return the dtype of a weight with these scales. Those of an fp16 model are fp16, and so are its products with them."""
    return scales.dtype if dtype_name(scales.dtype) == "fp16" else BF16


def _block_size(value: Any, name: str) -> tuple[int, int] | None:
    """Return the rows and columns of a block; None where scales are of whole rows or tensors."""
    match value:
        case None:
            return None
        case [int(rows), int(columns)] if is_size(rows) and is_size(columns) and rows and columns:
            return rows, columns
        case _:
            raise UserError(
                f"`{name}` in `quantization_config` is `{format_untrusted(value)}`", hint="it should be two sizes: [128, 128]"
            )


def _check_ignored(weights: Iterable[QuantizedWeight], settings: Settings) -> None:
    """Raise UserError for a quantized weight that the configuration lists as not quantized. Patterns are not evaluated."""
    listed: set[str] = set()
    for name in ("modules_to_not_convert", "ignore"):
        value = settings.get(name)
        entries = cast("list[Any]", value) if isinstance(value, list) else []
        listed |= {entry for entry in entries if isinstance(entry, str)}
    for weight in weights if listed else ():
        parts = weight.spec.name.removesuffix(".weight").split(".")
        paths = {".".join(parts[:end]) for end in range(1, len(parts) + 1)} | {
            ".".join(parts[start:]) for start in range(len(parts))
        }
        if paths & listed:
            raise UserError(
                f"`{weight.codes.name}` is quantized, but `quantization_config` lists `{min(paths & listed)}` as not quantized",
                hint=_DAMAGED,
            )


def _check_complete(specs: Specs, weights: Mapping[str, QuantizedWeight]) -> None:
    """Raise UserError for scales that belong to no quantized weight."""
    known = {spec.name for weight in weights.values() for spec in (weight.codes, *weight.side_tensors)}
    left = [name for name in specs if name.endswith(_SCALES) and name not in known]
    if left:
        verb = "belong" if len(left) > 1 else "belongs"
        raise UserError(f"{list_names(left)} {verb} to no quantized weight", hint=_DAMAGED)
