"""Small models whose weights are quantized as their publishers do it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import ml_dtypes
import numpy as np
from safetensors.numpy import load_file, save_file

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
    for place, part in blocks_of(numbers, block):
        scales[place] = np.abs(part).max() / 448
    for place, part in blocks_of(codes, block):
        row, column = (index * block for index in place)
        part[...] = (numbers[row : row + block, column : column + block] / scales[place]).astype(codes.dtype)
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
        for name, tensor in load_file(path).items():
            if chosen(name, tensor):
                tensors[name], tensors[name.removesuffix(".weight") + SCALES] = fp8_blocks(tensor, block)
            else:
                tensors[name] = tensor
        save_file(tensors, path, {"format": "pt"})
    index = target / "model.safetensors.index.json"
    if index.exists():
        content = json.loads(index.read_text())
        content["weight_map"] = {name: path.name for path in sorted(target.glob("*.safetensors")) for name in load_file(path)}
        index.write_text(json.dumps(content))
    settings = {"quant_method": "fp8", "activation_scheme": "dynamic", "fmt": "e4m3", "weight_block_size": [block, block]}
    configure(target, settings)
    return target


def configure(folder: Path, settings) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = settings
    (folder / "config.json").write_text(json.dumps(config, indent=2))


def edit(folder: Path, change) -> None:
    """Change the tensors of a model in one file."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
