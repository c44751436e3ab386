"""The weights of checkpoints of both kinds, as tensors by their names."""

from __future__ import annotations

import numpy as np
import torch
from safetensors.torch import load_file

from formats.folder import LocalFolder
from formats.torch_dist import TorchDistReader


def stored(out):
    """Every weight of a checkpoint, under Megatron's names with a number for each layer and expert."""
    reader = TorchDistReader(LocalFolder(out))
    reader.check()
    tensors = {}
    for name, spec in reader.specs.items():
        tensors[name] = np.empty(spec.shape, spec.dtype)
        reader.read(name, spec.full_region, tensors[name])
    reader.close()
    return tensors


def as_torch(array):
    return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16) if array.dtype.itemsize == 2 else torch.from_numpy(array)


def source(folder):
    """Every tensor of a model directory."""
    tensors = {}
    for file in folder.glob("*.safetensors"):
        tensors |= load_file(file)
    return tensors
