"""What every format must pass: any region reads back, in any order and from several threads; files are as announced.

`ReaderSuite` is for formats that are only read, from files that another program wrote.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from itertools import product
from typing import Any

import numpy as np

from formats.folder import LocalFolder
from formats.outputs import LocalOutputs
from formats.spec import DTYPES, TensorSpec, extent


class ReaderSuite:
    """Inherit it, and say how files are made and how to read them."""

    dtypes: tuple[str, ...] = ("bf16", "fp16", "fp32", "fp64", "fp8_e4m3", "int8", "int64", "uint8", "bool")

    matrix, vector = "decoder.layers.{}.w.{}", "{}"
    """Names of tensors: of a layer's matrix by its number and dtype, and of vectors outside layers."""

    def specs(self) -> list[TensorSpec]:
        named = [TensorSpec(self.matrix.format(n, d), (7, 12), DTYPES[d]) for n in range(3) for d in self.dtypes]
        single, flat = self.vector.format("one"), self.vector.format("flat")
        return [*named, TensorSpec(single, (1,), DTYPES["fp32"]), TensorSpec(flat, (4099,), DTYPES["bf16"])]

    def reader(self, folder) -> Any:
        raise NotImplementedError

    def store(self, folder) -> dict[str, np.ndarray]:
        """Write `values(specs())` into an empty folder, and return them."""
        raise NotImplementedError

    def values(self, specs) -> dict[str, np.ndarray]:
        rng = np.random.default_rng(7)
        return {s.name: np.frombuffer(rng.bytes(s.nbytes), np.uint8).view(s.dtype).reshape(s.shape) for s in specs}

    def test_all_reads_back_whole(self, tmp_path):
        values = self.store(tmp_path)
        reader = self.reader(LocalFolder(tmp_path))
        assert reader.specs.keys() == values.keys()
        for name, expected in values.items():
            spec = reader.specs[name]
            assert (spec.shape, spec.dtype) == (expected.shape, expected.dtype)
            out = np.empty(spec.shape, spec.dtype)
            reader.read(name, spec.full_region, out)
            assert out.tobytes() == expected.tobytes()

    def test_any_region_reads_back_also_into_strided_memory(self, tmp_path):
        values = self.store(tmp_path)
        reader = self.reader(LocalFolder(tmp_path))
        name = next(name for name in values if name.endswith(self.matrix.format(1, "bf16").removeprefix("decoder.")))
        for a, b, c, d in product((0, 3), (4, 7), (0, 5), (6, 12)):
            region = slice(a, b), slice(c, d)
            for out in (np.empty(extent(region), DTYPES["bf16"]), np.empty((b - a, 50), DTYPES["bf16"])[:, 1 : 1 + d - c]):
                reader.read(name, region, out)
                assert out.tobytes() == values[name][region].tobytes()

    def test_reading_past_the_cache_gives_the_same(self, tmp_path):
        values = self.store(tmp_path)
        reader = self.reader(LocalFolder(tmp_path, direct=True))
        for name, expected in values.items():
            out = np.empty(expected.shape, expected.dtype)
            reader.read(name, reader.specs[name].full_region, out)
            assert out.tobytes() == expected.tobytes()

    def test_reading_from_threads_gives_the_same(self, tmp_path):
        values = self.store(tmp_path)
        reader = self.reader(LocalFolder(tmp_path))

        def read(name):
            out = np.empty(reader.specs[name].shape, reader.specs[name].dtype)
            reader.read(name, reader.specs[name].full_region, out)
            return out.tobytes() == values[name].tobytes()

        with ThreadPoolExecutor(8) as pool:
            assert all(pool.map(read, [*values] * 5))


class FormatSuite(ReaderSuite):
    """Inherit it, and say how to write and how to read."""

    def writer(self, specs) -> Any:
        raise NotImplementedError

    def store(self, folder):
        return self.written(folder)[0]

    def written(self, folder, *, threads=1, step=2):
        specs = self.specs()
        folder.mkdir(exist_ok=True)
        outputs = LocalOutputs(folder)
        values, writer = self.values(specs), self.writer(specs)
        pieces = [
            (s, (slice(a, min(a + step, s.shape[0])), *s.full_region[1:])) for s in specs for a in range(0, s.shape[0], step)
        ]
        np.random.default_rng(1).shuffle(pieces)
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(lambda piece: writer.write(outputs, piece[0].name, piece[1], values[piece[0].name][piece[1]]), pieces))
        for file in writer.files:
            for span in writer.spans(file):
                outputs.put(file, span.start, span.known or b"")
        made = {name: b"".join(document.blocks()) for name, document in writer.documents.items()}
        assert {name: document.size for name, document in writer.documents.items()} == {n: len(data) for n, data in made.items()}
        documents = {**made, **writer.markers}
        for file, data in documents.items():
            outputs.put(file, 0, data)
        outputs.close()
        return values, {**writer.files, **{file: len(data) for file, data in documents.items()}}

    def test_threads_and_order_do_not_change_a_byte(self, tmp_path):
        self.written(tmp_path / "one")
        self.written(tmp_path / "many", threads=6, step=1)
        single, many = ({p.name: p.read_bytes() for p in (tmp_path / n).rglob("*") if p.is_file()} for n in ("one", "many"))
        assert single == many

    def test_files_have_the_announced_sizes(self, tmp_path):
        _, announced = self.written(tmp_path)
        sizes = {p.relative_to(tmp_path).as_posix(): p.stat().st_size for p in tmp_path.rglob("*") if p.is_file()}
        assert sizes == announced

    def test_spans_follow_one_another_and_hold_all_data(self):
        specs = self.specs()
        writer = self.writer(specs)
        for file, size in writer.files.items():
            end = 0
            for span in writer.spans(file):
                assert span.start == end
                end = span.stop
            assert end == size
        spans = [span for file in writer.files for span in writer.spans(file)]
        assert sum(span.size for span in spans if span.known is None) == sum(spec.nbytes for spec in specs)
