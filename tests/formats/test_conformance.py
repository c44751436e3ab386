"""Every format passes the conformance suite."""

from __future__ import annotations

import argparse

import numpy as np
import torch

from formats.detect import open_megatron
from formats.huggingface import HuggingFaceReader, HuggingFaceWriter, plan_shards
from formats.spec import DTYPES
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
    ones = dict.fromkeys(("tensor_model_parallel_size", "pipeline_model_parallel_size", "expert_model_parallel_size"), 1)
    torch.save({"args": argparse.Namespace(**{**ones, **sizes}), "model": model}, folder / "model_optim_rng.pt")
