"""Small models whose weights are quantized as their publishers do it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import ml_dtypes
import numpy as np
import torch
from safetensors.numpy import save_file
from safetensors.torch import load_file as load_torch

from tests.converter.family_suite import save_small

SCALES = ".weight_scale_inv"


def blocks_of(values, block):
    """Yield the blocks of a matrix, with their place in the grid."""
    for row in range(0, values.shape[0], block):
        for column in range(0, values.shape[1], block):
            yield (row // block, column // block), values[row : row + block, column : column + block]


def fp8_blocks(values, block):
    """As DeepSeek quantizes: the largest number of a block is the largest code."""
    numbers = values.astype(np.float32)
    grid = -(-numbers.shape[0] // block), -(-numbers.shape[1] // block)
    scales, codes = np.empty(grid, np.float32), np.empty(numbers.shape, ml_dtypes.float8_e4m3fn)
    for cell, part in blocks_of(numbers, block):
        scales[cell] = np.abs(part).max() / 448
    for cell, part in blocks_of(codes, block):
        row, column = (index * block for index in cell)
        part[...] = (numbers[row : row + block, column : column + block] / scales[cell]).astype(codes.dtype)
    return codes, scales


def is_quantized(name, tensor):
    return (
        tensor.ndim == 2
        and ".layers." in name
        and not any(word in name for word in ("norm", "gate.weight", "eh_proj", "embed", "head"))
    )


def fp8(source: Path, target: Path, *, block: int = 32, chosen=is_quantized) -> Path:
    """Write the model in `source` with its linear weights in FP8, one scale for each block."""
    shutil.copytree(source, target)
    for path in target.glob("*.safetensors"):
        tensors = {}
        for name, tensor in load(path).items():
            if chosen(name, tensor):
                tensors[name], tensors[name.removesuffix(".weight") + SCALES] = fp8_blocks(tensor, block)
            else:
                tensors[name] = tensor
        save_file(tensors, path, {"format": "pt"})
    index = target / "model.safetensors.index.json"
    if index.exists():
        content = json.loads(index.read_text())
        content["weight_map"] = {name: path.name for path in sorted(target.glob("*.safetensors")) for name in load(path)}
        index.write_text(json.dumps(content))
    settings = {"quant_method": "fp8", "activation_scheme": "dynamic", "fmt": "e4m3", "weight_block_size": [block, block]}
    configure(target, settings)
    return target


def load(path: Path) -> dict[str, np.ndarray]:
    """Return the tensors of a file. safetensors' own reader of numpy's arrays knows no FP8."""
    return {name: _array(tensor) for name, tensor in load_torch(path).items()}


def _array(tensor):
    kind = str(tensor.dtype).removeprefix("torch.")
    if not hasattr(ml_dtypes, kind):
        return tensor.numpy()
    return tensor.view({1: torch.uint8, 2: torch.int16}[tensor.element_size()]).numpy().view(getattr(ml_dtypes, kind))


def configure(folder: Path, settings) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = settings
    (folder / "config.json").write_text(json.dumps(config, indent=2))


def edit(folder: Path, change) -> None:
    """Change the tensors of a model in one file."""
    tensors = load(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def deepseek_v3(folder: Path) -> Path:
    """A small DeepSeek-V3 in bf16 with a layer of multi-token prediction, in files as it is published: embedding and output layer
    twice."""
    save_small("deepseek_v3", folder)
    config = json.loads((folder / "config.json").read_text())
    layers = config["num_hidden_layers"]
    (folder / "config.json").write_text(json.dumps({**config, "num_nextn_predict_layers": 1}, indent=2))

    def add(tensors):
        last, own = f"model.layers.{layers - 1}.", f"model.layers.{layers}."
        layer = {name: tensor for name, tensor in tensors.items() if name.startswith(last)}
        tensors |= {own + name.removeprefix(last): -tensor for name, tensor in layer.items()}
        norm, hidden = tensors["model.norm.weight"], config["hidden_size"]
        tensors |= {f"{own}{name}.weight": norm[::-1].copy() for name in ("enorm", "hnorm", "shared_head.norm")}
        tensors[f"{own}eh_proj.weight"] = np.resize(tensors["lm_head.weight"], (hidden, 2 * hidden))
        tensors[f"{own}embed_tokens.weight"] = tensors["model.embed_tokens.weight"]
        tensors[f"{own}shared_head.head.weight"] = tensors["lm_head.weight"]

    edit(folder, add)
    return folder


def mxfp4(source: Path, target: Path) -> Path:
    """Write the GPT-OSS in `source` with experts of arbitrary codes, as it is published."""
    shutil.copytree(source, target)
    drawn = np.random.default_rng(1)

    def change(tensors):
        for name in [name for name in tensors if name.endswith(("gate_up_proj", "down_proj"))]:
            experts, inner, rows = tensors.pop(name).shape
            tensors[f"{name}_blocks"] = drawn.integers(0, 256, (experts, rows, inner // 32, 16), dtype=np.uint8)
            tensors[f"{name}_scales"] = drawn.integers(0, 252, (experts, rows, inner // 32), dtype=np.uint8)

    edit(target, change)
    configure(target, {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn", "lm_head"]})
    return target


def int4(source: Path, target: Path, *, group: int = 32, symmetric: bool = True) -> Path:
    """Write the model in `source` with linear weights of arbitrary INT4 codes, as compressed-tensors packs them."""
    shutil.copytree(source, target)
    drawn = np.random.default_rng(1)

    def words(*shape):
        return drawn.integers(0, 256, (*shape, 4), dtype=np.uint8).view(np.int32)[..., 0]

    def change(tensors):
        for name in [name for name, tensor in tensors.items() if is_quantized(name, tensor)]:
            rows, columns = tensors.pop(name).shape
            tensors[f"{name}_packed"] = words(rows, columns // 8)
            tensors[f"{name}_scale"] = drawn.uniform(1e-3, 1e-1, (rows, columns // group)).astype(ml_dtypes.bfloat16)
            tensors[f"{name}_shape"] = np.array([rows, columns], np.int64)
            if not symmetric:
                tensors[f"{name}_zero_point"] = words(-(-rows // 8), columns // group)

    edit(target, change)
    weights = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": group, "symmetric": symmetric}
    groups = {"group_0": {"targets": ["Linear"], "weights": weights, "format": "pack-quantized"}}
    configure(target, {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": groups})
    return target
