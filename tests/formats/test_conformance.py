"""Every format passes the conformance suite."""

from __future__ import annotations

from dataclasses import replace

from formats.detect import open_megatron
from formats.fsdp_writer import FsdpTensor, FsdpWriter
from formats.huggingface import HuggingFaceReader, HuggingFaceWriter, plan_shards
from formats.rank_files_writer import Holder, RankArray, RankFilesWriter, RankState
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


class TestRankFiles(FormatSuite):
    def writer(self, specs):
        file = "mp_rank_00/model_optim_rng.pt"
        arrays = [RankArray(s.shape, ((s.full_region, (0,) * len(s.shape)),), (Holder(file, 0, s.name),)) for s in specs]
        placed = [(spec, (each,)) for spec, each in zip(specs, arrays, strict=True)]
        return RankFilesWriter(placed, [RankState(file, [["decoder.layers.0.w._extra_state"]])], {"iteration": 0})

    def reader(self, folder):
        return open_megatron(folder)


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
