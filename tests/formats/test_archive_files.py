"""Archives lie in their files one after the other, in the order in which they came, wherever they are aligned to."""

from __future__ import annotations

from array import array

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from formats.archive_files import ArchiveFiles, NewPart, Shard, append_parts
from formats.chunks import ChunkedTensor
from formats.spec import DTYPES
from formats.torch_zip import DATA_ALIGNMENT, Frame

FRAME = Frame(b"head", 3, b"tail")


def one_by_one(appended):
    """Where each archive starts, and how long its file is, placed one after the other."""
    ends, starts = {}, []
    for file, frame, alignment in appended:
        start = -(-ends.get(file, 0) // alignment) * alignment
        ends[file] = start + frame.length
        starts.append(start)
    return starts, ends


archives = st.lists(st.tuples(st.sampled_from("abc"), st.builds(Frame, st.binary(max_size=9), st.integers(0, 9), st.just(b"."))))


@given(archives, archives)
def test_archives_placed_together_lie_as_if_placed_one_by_one(objects, chunks):
    files, locations = ArchiveFiles(), []
    for some, alignment in ((objects, 1), (chunks, 8)):
        numbers = np.array([(files.file(file), files.frame(frame)) for file, frame in some], np.int64).reshape(-1, 2)
        locations += files.append(numbers[:, 0], numbers[:, 1], alignment=alignment).tolist()
    appended = [(*archive, 1) for archive in objects] + [(*archive, 8) for archive in chunks]
    starts, ends = one_by_one(appended)
    assert [start for _, start, _ in locations] == starts
    assert [length for _, _, length in locations] == [frame.length for _, frame, _ in appended]
    assert [files.names[file] for file, _, _ in locations] == [file for file, _, _ in appended]
    assert files.sizes == ends
    for name in files.names:
        expected = [(start, frame) for start, (file, frame, _) in zip(starts, appended, strict=True) if file == name]
        assert list(files.content(name)) == expected


def test_rows_of_a_key_may_be_held_in_different_ways_and_come_in_any_order():
    halves = [Shard((0, 0), (2, 3), "first"), Shard((2, 0), (2, 3), "second")]
    whole = [Shard((0, 0), (4, 3), "third")]
    parts = [NewPart("key", (2,), halves), NewPart("other", (), whole), NewPart("key", (0,), whole), NewPart("key", (1,), halves)]
    tensors = {"key": ((3, 4, 3), DTYPES["fp32"]), "other": ((4, 3), DTYPES["fp32"])}
    joined = append_parts(ArchiveFiles(), tensors, parts, lambda _dtype, _shape: FRAME)
    step, length = DATA_ALIGNMENT, FRAME.length
    expected = array("q", [
        0, 0, 0, 1, 4, 3, 2, step, length, -1,
        1, 0, 0, 1, 2, 3, 0, step, length, -1,
        1, 2, 0, 1, 2, 3, 1, step, length, -1,
        2, 0, 0, 1, 2, 3, 0, 0, length, -1,
        2, 2, 0, 1, 2, 3, 1, 0, length, -1,
    ])  # fmt: skip
    files = ["first", "second", "third"]
    assert np.array_equal(joined["key"].table(), ChunkedTensor((3, 4, 3), DTYPES["fp32"], expected, files).table())
    assert [chunk.location.offset for chunk in joined["other"].chunks] == [0]
