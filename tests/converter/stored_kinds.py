"""Store one model as every kind of Megatron checkpoint, and as the distributed checkpoints of other programs.

What `mbconvert` does not write is made of its `torch_dist`: the same tensors, stored by tensorstore, torch or `tarfile`.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file

from converter import hf_to_mcore
from formats.detect import open_megatron
from formats.folder import LocalFolder
from tests.converter import test_nemo
from tests.converter.test_chunked_models import as_titan
from tests.converter.test_kinds import as_zarr

LAYOUT = {"tp": 2, "pp": 2, "transformer_impl": "local"}


def torch_dist(source: Path, folder: Path) -> Path:
    """The twin of all others."""
    return _written("torch_dist", source, folder)


def _written(kind: str, source: Path, folder: Path, **layout: Any) -> Path:
    hf_to_mcore(source, folder / "m", ckpt_format=kind, **{**LAYOUT, **layout})
    return folder / "m"


def _zarr(source: Path, folder: Path) -> Path:
    written = torch_dist(source, folder)
    as_zarr(written / "iter_0000000", folder / "z" / "iter_0000000")
    (folder / "z" / "latest_checkpointed_iteration.txt").write_text("0")
    return folder / "z"


def _torch_dcp(source: Path, folder: Path) -> Path:
    reader = open_megatron(LocalFolder(torch_dist(source, folder)))
    state = {}
    for name, spec in reader.specs.items():
        out = np.empty(spec.shape, spec.dtype)
        reader.read(name, spec.full_region, out)
        state[f"model.{name}"] = test_nemo.as_tensor(out)
    dcp.save(state, checkpoint_id=folder / "t" / "iter_0000000", no_dist=True)
    (folder / "t" / "latest_checkpointed_iteration.txt").write_text("0")
    return folder / "t"


def _nemo_2(source: Path, folder: Path) -> Path:
    return test_nemo.nemo_2(folder / "n", test_nemo.keys_of(torch_dist(source, folder)))


def _nemo_1(source: Path, folder: Path) -> Path:
    keys = test_nemo.keys_of(torch_dist(source, folder))
    test_nemo.save_zarr(folder / "n" / "model_weights", keys, "model.")
    (folder / "n" / "model_config.yaml").write_text(test_nemo.nemo_1(source))
    return test_nemo.archive(folder / "n")


def _hf_dcp(source: Path, folder: Path) -> Path:
    dcp.save(load_file(source / "model.safetensors"), checkpoint_id=folder / "d", no_dist=True)
    return folder / "d"


def _titan(source: Path, folder: Path) -> Path:
    config = json.loads((source / "config.json").read_text())
    heads = (config["num_attention_heads"], config["num_key_value_heads"])
    state = as_titan(load_file(source / "model.safetensors"), before_2026=False, heads=heads)
    dcp.save(state, checkpoint_id=folder / "titan", no_dist=True)
    return folder / "titan"


def _hf_slices(source: Path, folder: Path) -> Path:
    writer = dcp.HuggingFaceStorageWriter(str(folder / "s"), save_distributed=True)
    dcp.save(load_file(source / "model.safetensors"), storage_writer=writer, no_dist=True)
    return folder / "s"


MEGATRON: dict[str, Callable[[Path, Path], Path]] = {
    "torch": lambda source, folder: _written("torch", source, folder),
    "fsdp_dtensor": lambda source, folder: _written("fsdp_dtensor", source, folder, pp=1),
    "zarr": _zarr,
    "torch_dcp": _torch_dcp,
    "nemo 2": _nemo_2,
    "nemo 1": _nemo_1,
}
"""Each stores the model of a Hugging Face directory below a folder, and returns its root."""

HUGGINGFACE: dict[str, Callable[[Path, Path], Path]] = {"hf dcp": _hf_dcp, "hf slices": _hf_slices, "titan": _titan}
