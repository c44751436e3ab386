"""Tiny quantized models, made of plain ones by the rule of each format, with the plain weights that they mean."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

FILE = "model.safetensors"
Tensors = dict[str, torch.Tensor]

E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])


def spread(scales: torch.Tensor, rows: int, columns: int, block: tuple[int, int]) -> torch.Tensor:
    """Return the scale of each weight."""
    return scales.repeat_interleave(block[0], 0)[:rows].repeat_interleave(block[1], 1)[:, :columns]


def fp8(weight: torch.Tensor, block: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return codes, the scale of each block, and what they mean."""
    rows, columns = weight.shape
    grid = torch.zeros(-(-rows // block[0]), -(-columns // block[1]))
    for row in range(grid.shape[0]):
        for column in range(grid.shape[1]):
            part = weight[row * block[0] :, column * block[1] :][: block[0], : block[1]]
            grid[row, column] = part.float().abs().max() / 448
    scales = spread(grid, rows, columns, block)
    codes = (weight.float() / scales).to(torch.float8_e4m3fn)
    return codes, grid, (codes.float() * scales).bfloat16()


def blocks(name: str, weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
    codes, grid, plain = fp8(weight, (32, 32))
    return {name: codes, f"{name}_scale_inv": grid}, plain


def blocks_ue8m0(name: str, weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
    grid = fp8(weight, (32, 32))[1].log2().ceil()
    scales = spread(grid.exp2(), *weight.shape, (32, 32))
    codes = (weight.float() / scales).to(torch.float8_e4m3fn)
    return {name: codes, f"{name}_scale_inv": (grid + 127).to(torch.uint8)}, (codes.float() * scales).bfloat16()


def mistral(name: str, weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
    codes, grid, _ = fp8(weight, tuple(weight.shape))
    module = name.removesuffix("weight")
    return {
        name: codes,
        f"{module}weight_scale_inv": grid.reshape(()).bfloat16(),
        f"{module}activation_scale": torch.tensor(0.5).bfloat16(),
    }, (codes.float() * grid.bfloat16().float()).bfloat16()


def mistral_native(name: str, weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
    codes, grid, plain = fp8(weight, tuple(weight.shape))
    module = name.removesuffix("weight")
    return {name: codes, f"{module}qscale_weight": grid.reshape(()), f"{module}qscale_act": torch.tensor(0.5)}, plain


def rows(name: str, weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
    codes, grid, plain = fp8(weight, (1, weight.shape[1]))
    return {name: codes, f"{name}_scale": grid, f"{name.removesuffix('weight')}input_scale": torch.ones(1)}, plain


def one_scale(name: str, weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
    codes, grid, plain = fp8(weight, tuple(weight.shape))
    return {name: codes, f"{name}_scale": grid.reshape(1)}, plain


def compressed_blocks(name: str, weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
    codes, grid, _ = fp8(weight, (32, 32))
    grid = grid.bfloat16()
    return {name: codes, f"{name}_scale": grid}, (codes.float() * spread(grid.float(), *weight.shape, (32, 32))).bfloat16()


def packed(codes: torch.Tensor) -> torch.Tensor:
    """Return 4-bit codes in int32 words, eight along the last axis."""
    grouped = codes.reshape(codes.shape[0], -1, 8).long() << torch.arange(0, 32, 4)
    return grouped.sum(-1).to(torch.uint32).view(torch.int32)


def int4(name: str, weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
    grouped = weight.float().reshape(weight.shape[0], -1, 16)
    scales = (grouped.abs().amax(-1) / 7.5).bfloat16()
    codes = (grouped / scales[..., None].float()).round().clamp(-8, 7).int()
    plain = (codes * scales[..., None].float()).bfloat16().reshape(weight.shape)
    return _packed(name, codes.reshape(weight.shape) + 8, scales, weight.shape), plain


def int4_rows(name: str, weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
    scales = (weight.float().abs().amax(-1, keepdim=True) / 7.5).bfloat16()
    codes = (weight.float() / scales.float()).round().clamp(-8, 7).int()
    return _packed(name, codes + 8, scales, weight.shape), (codes * scales.float()).bfloat16()


def int4_zero_points(name: str, weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
    grouped = weight.float().reshape(weight.shape[0], -1, 16)
    low = grouped.amin(-1)
    scales = ((grouped.amax(-1) - low) / 15).bfloat16()
    zeros = (-low / scales.float()).round().clamp(0, 15).int()
    codes = (grouped / scales[..., None].float() + zeros[..., None]).round().clamp(0, 15).int()
    plain = ((codes - zeros[..., None]) * scales[..., None].float()).bfloat16().reshape(weight.shape)
    stored = _packed(name, codes.reshape(weight.shape), scales, weight.shape)
    stored[f"{name}_zero_point"] = packed(zeros.T.contiguous()).T.contiguous()
    return stored, plain


def _packed(name: str, codes: torch.Tensor, scales: torch.Tensor, shape: torch.Size) -> Tensors:
    return {f"{name}_packed": packed(codes), f"{name}_scale": scales, f"{name}_shape": torch.tensor(shape)}


def mxfp4(name: str, weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
    """`weight` is [experts, in, out]."""
    grouped = weight.float().transpose(1, 2).reshape(weight.shape[0], weight.shape[2], -1, 32)
    exponents = (grouped.abs().amax(-1) / 6).log2().ceil().clamp(-127, 127)
    codes = (grouped / exponents.exp2()[..., None])[..., None].sub(E2M1).abs().argmin(-1)
    plain = (E2M1[codes] * exponents.exp2()[..., None]).bfloat16().reshape(*grouped.shape[:2], -1).transpose(1, 2).contiguous()
    stored = (codes[..., 0::2] | codes[..., 1::2] << 4).to(torch.uint8)
    return {f"{name}_blocks": stored, f"{name}_scales": (exponents + 127).to(torch.uint8)}, plain


def _compressed(kind: str, **weights: Any) -> dict[str, Any]:
    groups = {"group_0": {"targets": ["Linear"], "weights": weights}}
    return {"quant_method": "compressed-tensors", "format": kind, "config_groups": groups, "ignore": ["lm_head"]}


_FP8 = {"num_bits": 8, "type": "float"}
_INT4 = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 16}

SCHEMES: dict[str, tuple[Callable[[str, torch.Tensor], tuple[Tensors, torch.Tensor]], dict[str, Any]]] = {
    "blocks": (blocks, {"quant_method": "fp8", "weight_block_size": [32, 32], "modules_to_not_convert": ["lm_head"]}),
    "blocks, ue8m0": (blocks_ue8m0, {"quant_method": "fp8", "weight_block_size": [32, 32], "scale_fmt": "ue8m0"}),
    "Mistral's": (mistral, {"quant_method": "fp8", "weight_block_size": None, "activation_scheme": "static"}),
    "Mistral's own names": (mistral_native, {"quant_method": "fp8", "weight_block_size": None}),
    "rows": (rows, _compressed("float-quantized", **_FP8, strategy="channel")),
    "one scale": (one_scale, _compressed("float-quantized", **_FP8, strategy="tensor")),
    "compressed-tensors' blocks": (
        compressed_blocks,
        _compressed("float-quantized", **_FP8, strategy="block", block_structure=[32, 32]),
    ),
    "int4": (int4, _compressed("pack-quantized", **_INT4, symmetric=True)),
    "int4 by row": (int4_rows, _compressed("pack-quantized", **{**_INT4, "strategy": "channel"}, symmetric=True)),
    "int4 with zero points": (int4_zero_points, _compressed("pack-quantized", **_INT4, symmetric=False)),
    "mxfp4": (mxfp4, {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}),
}
"""By name: what quantizes a weight, and the `quantization_config` that says so."""

_PROJECTIONS = ("proj.weight", "w1.weight", "w2.weight", "w3.weight", "experts.gate_up_proj", "experts.down_proj")


def quantize(source: Path, target: Path, scheme: str, *, only: Callable[[str], bool] = lambda _: True) -> Path:
    """Write to `target` the model in `source` with its projections quantized, and to `target.plain` what it means."""
    rule, described = SCHEMES[scheme]
    stored, plain = Tensors(), Tensors()
    for name, weight in load_file(source / FILE).items():
        if not name.endswith(_PROJECTIONS) or not only(name):
            stored[name] = plain[name] = weight
            continue
        made, plain[name] = rule(name, weight)
        stored |= made
    _save(source, target, stored, quantization_config=described)
    _save(source, plain_of(target), plain)
    return target


def plain_of(target: Path) -> Path:
    return target.with_name(f"{target.name}.plain")


def _save(source: Path, target: Path, tensors: Tensors, **config: Any) -> None:
    shutil.copytree(source, target, ignore=shutil.ignore_patterns("*.safetensors", "*.index.json"))
    save_file(tensors, target / FILE, {"format": "pt"})
    known = json.loads((source / "config.json").read_text())
    (target / "config.json").write_text(json.dumps({**known, **config}))


def change(folder: Path, **tensors: torch.Tensor | None) -> None:
    """Set tensors of a model, or take them out, by the end of their names."""
    held = load_file(folder / FILE)
    for ending, value in tensors.items():
        name = next(name for name in held if name.endswith(ending))
        if value is None:
            del held[name]
        else:
            held[name] = value
    save_file(held, folder / FILE, {"format": "pt"})


def describe(folder: Path, **changes: Any) -> None:
    """Set fields of a model's `quantization_config`."""
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] |= changes
    (folder / "config.json").write_text(json.dumps(config))
