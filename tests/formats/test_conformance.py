"""Every format passes the conformance suite."""

from __future__ import annotations

from formats.detect import open_megatron
from formats.huggingface import HuggingFaceReader, HuggingFaceWriter, plan_shards
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
