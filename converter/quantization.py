"""Quantized weights that are not read, and weights that `config.json` only says are quantized.

What converter/dequantization.py reads does not get here. A quantized weight is rounded, and spread over several tensors: it is
recognized by the names of those and by its dtype, and only the library that made it knows how to put it together. Where plain
weights are said to be quantized (dequantized ones, or a base that an adapter was merged into), loaders would take the plain
numbers for quantized ones.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any, cast

import numpy as np

from converter.config import TEXT
from converter.plan import list_names
from formats.dtypes import FLOATS
from formats.errors import UserError, format_untrusted
from formats.spec import DTYPES, TensorSpec

_METHODS = (
    ("GPTQ", r"g_idx"),
    ("AWQ or GPTQ", r"qweight|qzeros"),
    ("bitsandbytes", r"(nested_)?(absmax|quant_map)|quant_state\.bitsandbytes__\w+|bitsandbytes__\w+|SCB|weight_format"),
    ("FP8 with a scale for each block", r"weight_scale_inv"),
    ("compressed-tensors", r"weight_packed|weight_shape|weight_zero_point|weight_g_idx|weight_global_scale"),
    ("ModelOpt", r"weight_scale_2|(weight|input|output|[qkv]_bmm)_quantizer\..*"),
    ("MXFP4", r"\w*_blocks|blocks"),
    ("EXL2", r"q_weight|q_scale|q_scale_max|q_groups|q_group_map|q_invperm|q_perm"),
    ("EXL3", r"trellis|suh|svh|mcg|mul1"),
    ("AQLM", r"codes|codebooks"),
    ("VPTQ", r"(res_|outlier_)?(indices|centroids)(\.weight)?|weight_bias"),
    ("HQQ", r"W_q|W_s|meta"),
    ("quanto", r"weight\._(data|scale|shift|packed)\b.*"),
    ("torchao", r"(_?weight)_(qdata|int_data|scale_and_zero)|weight:_.*|weight\.(layout_tensor|tensor_impl|original_weight).*"),
    ("QuIP#", r"Qidxs\w*|SU|SV"),
    ("SpQR", r"dense_weights|row_offsets|col_vals"),
    ("Marlin", r"B|s|workspace"),
    ("HIGGS", r"tables2?"),
    ("EETQ", r"weight_scales"),
    ("MLX", r"biases"),
    ("", r"(\w+_)?(scales?|zeros?|zero_points?|scale_inv|amax)\w*"),
)
"""Methods, each with what the names of its tensors end in. The last is of several."""

_CONFIGS = {"fp8": "FineGrainedFP8Config", "mxfp4": "Mxfp4Config", "compressed-tensors": "CompressedTensorsConfig"}
_METHODS_OF_LIBRARIES = {"MXFP4": "mxfp4", "compressed-tensors": "compressed-tensors", "FP8 with a scale for each block": "fp8"}

_UNSAID = (
    "`config.json` does not say so: with the `quantization_config` that the model was published with, it is converted; or "
    "convert the original weights (bf16), from which it was made"
)
"""What to do with a scheme that is read where the configuration describes it."""

_FIELDS = ("quantization_config", "compression_config")
_PLAIN = frozenset(DTYPES[name] for name in FLOATS)


def quantization(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a `config.json` says of quantization, by the paths of its fields: there, or in its `text_config`.

    >>> quantization({"text_config": {"quantization_config": {"quant_method": "fp8"}}})
    {'text_config.quantization_config': {'quant_method': 'fp8'}}
    """
    inner = config.get(TEXT)
    fields = {name: config[name] for name in _FIELDS if config.get(name)}
    if isinstance(inner, dict):
        fields |= {f"{TEXT}.{name}": value for name, value in quantization(cast("dict[str, Any]", inner)).items()}
    return fields


def without_quantization(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a `config.json` without what it says of quantization."""
    left = {name: value for name, value in config.items() if not (name in _FIELDS and value)}
    inner = left.get(TEXT)
    return left | ({TEXT: without_quantization(cast("dict[str, Any]", inner))} if isinstance(inner, dict) else {})


def is_plain(dtypes: Collection[np.dtype[Any]]) -> bool:
    """Return whether weights of these dtypes are numbers without scales."""
    return _PLAIN.issuperset(dtypes)


def method_in(config: Mapping[str, Any]) -> str:
    """Return the method of quantization that a `config.json` names; nothing if it names none."""
    for value in quantization(config).values():
        if isinstance(value, dict):
            settings = cast("dict[str, Any]", value)
            return format_untrusted(settings.get("quant_method") or settings.get("quant_algo") or "unnamed method")
    return "MLX" if isinstance(config.get("quantization"), dict) else ""


def method_of(names: Sequence[str]) -> tuple[str, list[str]]:
    """Return the method that these names tell of, and those of them that do; no names if none does."""
    for method, pattern in _METHODS:
        ending = re.compile(rf"(.*\.)?({pattern})")
        matching = [name for name in names if ending.fullmatch(name)]
        if matching:
            return method, matching
    return "", []


def refuse_quantized(specs: Mapping[str, TensorSpec], over: Sequence[str], config: Mapping[str, Any], *, label: str) -> None:
    """Raise UserError if weights are quantized: if among `over`, the names that the model does not have, are scales and the
    like, or if weights are whole numbers. FP8 without scales is a plain dtype."""
    by_name, names = method_of(over)
    named = method_in(config)
    if names:
        what = f"it holds {list_names(names)}"
    else:
        whole = [spec for spec in specs.values() if spec.name not in over and _rounded(spec)]
        if not whole:
            return
        what = f"`{whole[0].name}` is {whole[0].stored_dtype}"
    hint = _UNSAID if not named and by_name in _METHODS_OF_LIBRARIES else _hint(named or by_name, label)
    raise UserError(f"`{label}` is quantized ({named or by_name or 'method unknown'}): {what}", hint=hint)


def _rounded(spec: TensorSpec) -> bool:
    name = spec.stored_dtype
    return name.startswith(("int", "uint", "fp8_e8m0", "F4", "F6"))


def _hint(method: str, label: str) -> str:
    first = "convert the original weights (bf16), from which it was made; or dequantize it first: "
    known = _METHODS_OF_LIBRARIES.get(method, method)
    if known in _CONFIGS:
        made = f"quantization_config={_CONFIGS[known]}(dequantize=True)"
        return f'{first}`AutoModelForCausalLM.from_pretrained("{label}", {made}).save_pretrained("OUT")` in transformers'
    if known.startswith("bitsandbytes"):
        loaded = f'm = AutoModelForCausalLM.from_pretrained("{label}")'
        return f'{first}`{loaded}; m.dequantize(); m.save_pretrained("OUT")` in transformers'
    if known == "MLX":
        return f"{first}`mlx_lm.convert --hf-path {label} --mlx-path OUT --dequantize`"
    return f"{first}with the library that quantized it"
