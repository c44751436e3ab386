"""Choose which weights of an export are quantized anew, under which names, and what `config.json` then says."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from converter.dequantization import settings_of
from converter.plan import TensorPlan, as_stored
from converter.planned_reader import PlannedReader
from converter.quantization import without_quantization
from converter.side_files import CONFIG, HFReference
from formats.dtypes import QUANTIZED
from formats.errors import UserError
from formats.quantized.fp8 import Fp8
from formats.quantized.mxfp4 import BYTES, GROUP, Mxfp4
from formats.quantized.requantized import Fp8Blocks, Mxfp4Groups, RequantizedReader, RoundingError
from formats.quantized.scheme import BF16, QuantizedWeight
from formats.spec import DTYPES, JoinedReader, Reader, TensorSpec

FP8_BLOCK, MXFP4 = QUANTIZED

_BLOCK = (128, 128)
_MXFP4_SETTINGS = {
    "modules_to_not_convert": ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"],
    "quant_method": "mxfp4",
}


def requantize(
    tensor_plans: Sequence[TensorPlan], tensors: Reader, before: Mapping[str, QuantizedWeight], origin: HFReference, method: str
) -> tuple[list[TensorPlan], Reader, HFReference, RequantizedReader]:
    """Return the plans of a model's tensors with its weights quantized by `method`, their reader, and the reference whose
    `config.json` says so. `before` are the quantized weights of the source, whose list is followed.

    Raises UserError for a model without weights that the method can hold.
    """
    chosen = [tensor_plan for tensor_plan in tensor_plans if _is_chosen(tensor_plan, before, method)]
    if not chosen:
        raise UserError(
            f"`--quantize {method}` finds no weights to quantize in a `{origin.config.get('model_type')}`",
            hint="MXFP4 is how GPT-OSS stores its experts; fp8-block takes linear weights with a tensor for each expert",
        )
    planned = {plan.spec.name: replace(plan, spec=plan.spec.cast(BF16)) for plan in chosen}
    block = _block_of(origin)
    make = _fp8_weight if method == FP8_BLOCK else _mxfp4_weight
    weights = {name: make(plan.spec, block) for name, plan in planned.items()}
    quantizer = Fp8Blocks(block) if method == FP8_BLOCK else Mxfp4Groups()
    reader = RequantizedReader(PlannedReader(tensors, planned), weights.values(), quantizer)
    rest = [tensor_plan for tensor_plan in tensor_plans if tensor_plan.spec.name not in weights]
    settings = _fp8_settings(rest, block) if method == FP8_BLOCK else _MXFP4_SETTINGS
    own = settings_of(origin.config) or {}
    stays = own.get("quant_method") == settings["quant_method"] and weights.keys() == before.keys()
    config = origin.config if stays else {**without_quantization(origin.config), "quantization_config": settings}
    reference = replace(origin, config=config, files={name: file for name, file in origin.files.items() if name != CONFIG})
    return [*rest, *as_stored(reader.specs).values()], JoinedReader(tensors, reader), reference, reader


def _is_chosen(tensor_plan: TensorPlan, before: Mapping[str, QuantizedWeight], method: str) -> bool:
    spec = tensor_plan.spec
    if method == MXFP4:
        stacked = len(spec.shape) == 3 and spec.name.endswith(("experts.gate_up_proj", "experts.down_proj"))
        return stacked and not spec.shape[1] % GROUP
    if len(spec.shape) != 2 or not spec.name.endswith(".weight"):
        return False
    return spec.name in before if before else _is_linear(tensor_plan)


def _is_linear(tensor_plan: TensorPlan) -> bool:
    """Is it the weight of a linear layer's module? Megatron's names say so: not a router's, nor the output layer's."""
    made_of = [part.name for part in tensor_plan.parts if part.name != tensor_plan.spec.name]
    return any(name.endswith(".weight") and name.split(".")[-2].startswith("linear_") for name in made_of)


def _block_of(origin: HFReference) -> tuple[int, int]:
    match (settings_of(origin.config) or {}).get("weight_block_size"):
        case [int(rows), int(columns)]:
            return rows, columns
        case _:
            return _BLOCK


def _fp8_weight(spec: TensorSpec, block: tuple[int, int]) -> QuantizedWeight:
    grid = tuple(-(-size // part) for size, part in zip(spec.shape, block, strict=True))
    codes, scales = spec.cast(DTYPES["fp8_e4m3"]), TensorSpec(f"{spec.name}_scale_inv", grid, DTYPES["fp32"])
    return QuantizedWeight(spec, codes, (scales,), Fp8("FP8", codes.dtype, block, grid))


def _mxfp4_weight(spec: TensorSpec, _block: tuple[int, int]) -> QuantizedWeight:
    experts, inner, rows = spec.shape
    stored, byte = (experts, rows, inner // GROUP), DTYPES["uint8"]
    codes, scales = TensorSpec(f"{spec.name}_blocks", (*stored, BYTES), byte), TensorSpec(f"{spec.name}_scales", stored, byte)
    return QuantizedWeight(spec, codes, (scales,), Mxfp4())


def _fp8_settings(rest: Iterable[TensorPlan], block: tuple[int, int]) -> dict[str, Any]:
    """Return what transformers and vLLM read. Modules with other matrices are listed: they would look for scales."""
    names = [plan.spec.name for plan in rest if len(plan.spec.shape) > 1 and plan.spec.name.endswith(".weight")]
    modules = [name.removesuffix(".weight") for name in names]
    return {
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "modules_to_not_convert": [name for name in modules if "embed" not in name],
        "quant_method": "fp8",
        "weight_block_size": list(block),
    }


def rounding(error: RoundingError) -> str:
    """Return what quantizing has changed, in words: of the weights that this process wrote."""
    name, worst = error.worst if error.sums else ("none", 0.0)
    return (
        f"quantizing changed {len(error.sums)} weights by {error.overall:.3%} of their root mean square, "
        f"`{name}` by {worst:.3%}, which is the most"
    )
