"""Files of two tensor-parallel ranks, with optimizer state: one file is damaged, and what is read of it checked.

Where damage is accepted, every shard of a weight or of its state has the bytes of an array in a record of its file, as Python's
zipfile finds it.
"""

from __future__ import annotations

import argparse
import io
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from itertools import count
from pathlib import Path

import numpy as np
import torch

from formats.chunks import Chunk
from formats.detect import open_megatron
from formats.disk import user_errors
from formats.folder import LocalFolder
from formats.optimizer.open import open_optimizer
from formats.rank_files import RankFilesReader
from formats.rank_shards import ShardedReader
from tests.fuzz.zips import zipped

FILE, OPTIMIZER = "mp_rank_01/model_optim_rng.pt", "mp_rank_01/distrib_optim.pt"

_LAYER = {
    "self_attention.linear_proj.weight": (8, 4), "self_attention.linear_qkv.weight": (8, 8), "mlp.linear_fc1.weight": (8, 8),
    "mlp.linear_fc2.weight": (8, 4), "input_layernorm.weight": (8,),
}  # fmt: skip
_GROUPS = [{"lr": 0.1, "wd_mult": 1.0, "betas": (0.9, 0.99)}, {"lr": 0.1, "wd_mult": 0.0, "betas": (0.9, 0.99)}]


@dataclass
class Contents:
    """What was read: by state (the weights' is empty) and name each shard's place and bytes."""

    shards: dict[tuple[str, str], list[tuple[Chunk, bytes]]]


@user_errors()
def read(folder: Path) -> Contents:
    """Every weight and the state of each."""
    reader = open_megatron(LocalFolder(folder))
    try:
        assert isinstance(reader, RankFilesReader)
        reader.check()
        contents = Contents({})
        _read(contents, "", reader.weights)
        optimizer = open_optimizer(reader)
        for state, held in optimizer.states.items() if optimizer else ():
            assert isinstance(held, ShardedReader)
            _read(contents, state, held)
    finally:
        reader.close()
    return contents


def _read(contents: Contents, state: str, reader: ShardedReader) -> None:
    for name, spec in reader.specs.items():
        whole = np.empty(spec.shape, spec.dtype)
        reader.read(name, spec.full_region, whole)
        contents.shards[state, name] = [(chunk, whole[chunk.region].tobytes()) for chunk in reader.chunks(name)]


def check(contents: Contents, folder: Path, _before: object) -> None:
    assert contents.shards
    records = {path.name: zipped(path.read_bytes()) for path in folder.glob("mp_rank_01/*.pt")}
    for held in contents.shards.values():
        for chunk, values in held:
            location = chunk.location
            raw = (folder / location.file).read_bytes()[location.offset : location.offset + location.length]
            assert values in raw, f"not what is at {location}"
            rank, _, file = location.file.partition("/")
            known = records[file] if rank == "mp_rank_01" else None
            assert known is None or any(raw in record for record in known), f"not in a record: {location}"


@cache
def plain() -> tuple[dict[str, bytes], ...]:
    """State that is not distributed."""
    return (_files(_plain),)


@cache
def distributed() -> tuple[dict[str, bytes], ...]:
    """State of the distributed optimizer."""
    return (_files(_distributed),)


def _files(optimizer: Callable[[dict[str, torch.Tensor]], tuple[object, object]]) -> dict[str, bytes]:
    files: dict[str, bytes] = {}
    for tp in range(2):
        model = _model(tp)
        held, beside = optimizer(model)
        args = argparse.Namespace(
            tensor_model_parallel_size=2,
            pipeline_model_parallel_size=1,
            expert_model_parallel_size=1,
            num_layers=2,
            hidden_size=8,
        )
        content = {"args": args, "iteration": 3, "checkpoint_version": 3.0, "model": model, "optimizer": held, "rng_state": [{}]}
        files[f"mp_rank_{tp:02d}/model_optim_rng.pt"] = _saved(content)
        if beside:
            files[f"mp_rank_{tp:02d}/distrib_optim.pt"] = _saved(beside)
    return files


def _model(tp: int) -> dict[str, torch.Tensor]:
    """Views of one storage, in reverse order from multiples of 64 on, as megatron-core has them; norms are equal."""
    shapes = {f"decoder.layers.{number}.{name}": shape for number in range(2) for name, shape in _LAYER.items()}
    storage = torch.arange(64 * len(shapes)).bfloat16()
    model: dict[str, torch.Tensor] = {}
    for (name, shape), start in zip(shapes.items(), count(64 * len(shapes) - 64, -64), strict=False):
        size = int(np.prod(shape))
        storage[start : start + size] += 0 if len(shape) == 1 else 100 * tp
        model[name] = storage[start : start + size].view(shape)
    return model


def _plain(model: dict[str, torch.Tensor]) -> tuple[object, None]:
    groups = [[name for name in model if (model[name].ndim == 1) == norms] for norms in (False, True)]
    order = [name for group in groups for name in group]
    state = {i: {key: model[name].float() + n for n, key in enumerate(("exp_avg", "exp_avg_sq"))} for i, name in enumerate(order)}
    numbered = [{**_GROUPS[n], "params": [order.index(name) for name in group]} for n, group in enumerate(groups)]
    masters = [[model[name].float() for name in group] for group in groups]
    return {"optimizer": {"state": state, "param_groups": numbered}, "fp32_from_fp16_params": masters}, None


def _distributed(model: dict[str, torch.Tensor]) -> tuple[object, object]:
    storage = torch.tensor(next(iter(model.values())).untyped_storage(), dtype=torch.uint8).view(torch.bfloat16).float()
    size = max(weight.storage_offset() + weight.numel() for weight in model.values())
    flat = {key: storage[:size] + n for n, key in enumerate(("param", "exp_avg", "exp_avg_sq"))}
    buffer = {(torch.bfloat16, torch.float32): {**flat, "numel_unpadded": size}}
    return {"optimizer": {"param_groups": _GROUPS}}, {"buckets_coalesced": True, 0: buffer}


def _saved(value: object) -> bytes:
    file = io.BytesIO()
    torch.save(value, file)
    return file.getvalue()
