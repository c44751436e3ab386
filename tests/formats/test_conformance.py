"""Every format passes the conformance suite."""

from __future__ import annotations

import argparse
import json
from dataclasses import replace

import numpy as np
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import save_file

from formats.detect import open_checkpoint, open_megatron
from formats.fsdp_writer import FsdpTensor, FsdpWriter
from formats.huggingface import HuggingFaceReader, HuggingFaceWriter, plan_shards
from formats.rank_files_writer import Holder, RankArray, RankFilesWriter, RankState
from formats.spec import DTYPES, names_of
from formats.torch_dist import TorchDistReader
from formats.torch_dist_writer import ShardedTensor, TorchDistWriter
from tests.formats import zarr_arrays
from tests.formats.conformance import FormatSuite, ReaderSuite


class TestHuggingFace(FormatSuite):
    def writer(self, specs):
        return HuggingFaceWriter(plan_shards(specs, limit=2000))

    def reader(self, folder):
        return HuggingFaceReader(folder)


class TestTorchDist(FormatSuite):
    def writer(self, specs):
        return TorchDistWriter([self.placed(spec) for spec in specs])

    def placed(self, spec):
        return ShardedTensor(spec, ((spec.full_region, 0),))

    def reader(self, folder):
        return TorchDistReader(folder)


class TestTorchDistInQuarters(TestTorchDist):
    """Chunks that cut columns too, so that pieces cross them in every way."""

    def placed(self, spec):
        if len(spec.shape) == 1:
            return ShardedTensor(spec, ((spec.full_region, 1),))
        return ShardedTensor(spec, tuple(
            ((slice(*rows), slice(*columns)), rank)
            for rank, (rows, columns) in enumerate((r, c) for r in ((0, 3), (3, 7)) for c in ((0, 5), (5, 12)))
        ))  # fmt: skip


class TestFsdp(TestTorchDistInQuarters):
    def writer(self, specs):
        placed = map(self.placed, specs)
        return FsdpWriter([FsdpTensor(spec, spec.name, False, chunks) for spec, chunks in placed], {"iteration": 0})


class TestGatedFsdp(TestFsdp):
    """A gated weight is two keys."""

    def specs(self):
        return [replace(spec, shape=(8, 12) if len(spec.shape) > 1 else spec.shape) for spec in super().specs()]

    def writer(self, specs):
        return FsdpWriter(map(self.halved, specs), {"iteration": 0})

    def halved(self, spec):
        if len(spec.shape) == 1:
            return FsdpTensor(spec, spec.name, False, ((spec.full_region, 0),))
        boxes = [(slice(*rows), slice(*columns)) for rows in ((0, 3), (3, 4), (4, 8)) for columns in ((0, 5), (5, 12))]
        return FsdpTensor(spec, spec.name, True, tuple((box, number % 2) for number, box in enumerate(boxes)))


class TestWrittenRankFiles(FormatSuite):
    def writer(self, specs):
        file = "mp_rank_00/model_optim_rng.pt"
        arrays = [RankArray(s.shape, ((s.full_region, (0,) * len(s.shape)),), (Holder(file, 0, s.name),)) for s in specs]
        placed = [(spec, (each,)) for spec, each in zip(specs, arrays, strict=True)]
        return RankFilesWriter(placed, [RankState(file, [["decoder.layers.0.w._extra_state"]])], {"iteration": 0})

    def reader(self, folder):
        return open_megatron(folder)


class TestHuggingFaceDcp(ReaderSuite):
    """What torch's own writer saved beside an optimizer's state, the model under `model.`."""

    prefix = "model."

    def specs(self):
        return [replace(spec, name=spec.name.replace("decoder.", "model.")) for spec in super().specs()]

    def store(self, folder):
        values = self.values(self.specs())
        state = {f"{self.prefix}{name}": as_tensor(value) for name, value in values.items()}
        dcp.save({**state, "optimizer.state.exp_avg": torch.ones(2)}, checkpoint_id=folder, no_dist=True)
        return values

    def reader(self, folder):
        return open_checkpoint(folder)


class TestBareHuggingFaceDcp(TestHuggingFaceDcp):
    prefix = ""


class TestSlicedSafetensors(TestHuggingFaceDcp):
    """Slices of rows and of columns, in three files that the safetensors library wrote."""

    def store(self, folder):
        values = self.values(self.specs())
        folder.mkdir(exist_ok=True)
        for number in range(3):
            cuts = {name: cut(value, number) for name, value in values.items()}
            cuts = {name: (corner, part) for name, (corner, part) in cuts.items() if part.size}
            info = json.dumps({name: {"saved_offsets": corner} for name, (corner, _) in cuts.items()})
            save_file(
                {name: as_tensor(part) for name, (_, part) in cuts.items()},
                folder / f"shard-0000{number + 1}-model-00001-of-00001.safetensors",
                metadata={"format": "pt", "DCP_SHARDING_INFO": info},
            )
        return values


def cut(value, number):
    """Return the corner and the data of a slice: matrices of large numbers by columns, all else by rows."""
    axis = value.ndim - 1 if value.ndim > 1 and value.dtype.itemsize > 1 else 0
    step = -(-value.shape[axis] // 3)
    region = [slice(None)] * value.ndim
    region[axis] = slice(number * step, (number + 1) * step)
    return [number * step if dim == axis else 0 for dim in range(value.ndim)], np.ascontiguousarray(value[tuple(region)])


def as_tensor(value):
    """Return torch's tensor of the same bytes and dtype."""
    dtype = getattr(torch, names_of(value.dtype).torch)
    return torch.from_numpy(value.view(np.uint8).reshape(-1).copy()).view(dtype).reshape(value.shape)


class TestZarr(ReaderSuite):
    """Arrays that tensorstore wrote, in chunks that do not divide them."""

    dtypes = ("bf16", "fp16", "fp32", "fp64", "int8", "int32", "int64", "uint8", "bool")
    compressor: str | None = None

    def store(self, folder):
        values = self.values(self.specs())
        folder.mkdir(exist_ok=True)
        for name, value in values.items():
            zarr_arrays.write(folder / name, value, chunks=(3, 5) if value.ndim == 2 else (1000,), compressor=self.compressor)
        zarr_arrays.mark(folder)
        return values

    def reader(self, folder):
        return open_megatron(folder)


class TestCompressedZarr(TestZarr):
    compressor = "zlib"
    dtypes = ("bf16", "fp32", "int64")


def as_torch(array):
    """The same in torch, whose name of a dtype is numpy's here."""
    return torch.from_numpy(array.view(np.uint8).copy()).view(getattr(torch, array.dtype.name))


class TestRankFiles(ReaderSuite):
    """The file of one rank, whose tensors of a dtype are views of one storage, three elements into it and with gaps."""

    def store(self, folder):
        values, model = self.values(self.specs()), {}
        for dtype in self.dtypes:
            mine = {name: as_torch(value) for name, value in values.items() if value.dtype == DTYPES[dtype]}
            gap = torch.zeros(3 * DTYPES[dtype].itemsize, dtype=torch.uint8)
            parts = [part for value in mine.values() for part in (gap, value.flatten().view(torch.uint8))]
            storage, start = torch.cat(parts).view(next(iter(mine.values())).dtype), 3
            for name, value in mine.items():
                model[name] = storage[start : start + value.numel()].view(value.shape)
                start += value.numel() + 3
        save_rank(folder / "mp_rank_00", model)
        return values

    def reader(self, folder):
        return open_megatron(folder)


class TestRankFilesOfFour(TestRankFiles):
    """Two ranks divide columns, two others have the last layer; vectors are whole in each."""

    matrix, vector = "decoder.layers.{}.{}.linear_proj.weight", "{}_norm.weight"

    def store(self, folder):
        values = self.values(self.specs())
        for tp in range(2):
            for pp in range(2):
                model = {name: as_torch(value) for name, value in values.items() if value.ndim == 1}
                for dtype in self.dtypes:
                    for local, number in enumerate(((0, 1), (2,))[pp]):
                        whole = values[self.matrix.format(number, dtype)]
                        model[self.matrix.format(local, dtype)] = as_torch(np.ascontiguousarray(whole[:, 6 * tp : 6 * tp + 6]))
                save_rank(
                    folder / f"mp_rank_{tp:02d}_{pp:03d}", model, tensor_model_parallel_size=2, pipeline_model_parallel_size=2
                )
        return values


def save_rank(folder, model, **sizes):
    folder.mkdir(parents=True)
    defaults = dict.fromkeys(("tensor_model_parallel_size", "pipeline_model_parallel_size", "expert_model_parallel_size"), 1)
    torch.save({"args": argparse.Namespace(**{**defaults, **sizes}), "model": model}, folder / "model_optim_rng.pt")
