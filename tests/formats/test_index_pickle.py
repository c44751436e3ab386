"""Patterns give what the opcodes would: where a pickle changes what they mean, or what they stand for, they are used no more."""

from __future__ import annotations

import pickle
import struct
from array import array

import numpy as np
import pytest
import torch

from formats.chunks import ChunkedTensor
from formats.dcp_index import METADATA, read_index
from formats.errors import UserError
from formats.folder import LocalFolder
from formats.index_pickle import load_index
from formats.index_writer import index_document
from formats.pickles import loads

LENGTH = 100  # bytes of each archive


def index(count):
    """An index of one tensor, a chunk for each row."""
    numbers = array("q", [number for row in range(count) for number in (row, 0, 1, 4, 0, LENGTH * row, LENGTH, -1)])
    tensor = ChunkedTensor((count, 4), np.dtype(np.float32), numbers, ["__0_0.distcp"])
    return b"".join(index_document({"a": tensor}, ([], np.empty((0, 3), np.int64), ["__0_0.distcp"])).blocks())


def text(value, number):
    return pickle.BINUNICODE + struct.pack("<I", len(value)) + value.encode() + pickle.LONG_BINPUT + struct.pack("<I", number)


def number_of(data, name):
    spelled = pickle.BINUNICODE + struct.pack("<I", len(name)) + name.encode() + pickle.LONG_BINPUT
    at = data.index(spelled) + len(spelled)
    return struct.unpack("<I", data[at : at + 4])[0]


def test_names_that_change_places_change_what_later_records_say(tmp_path):
    data = index(8)
    end = pickle.TUPLE * 2 + pickle.REDUCE + pickle.SETITEMS + pickle.BUILD  # of a chunk
    parts = data.split(end)
    first, second = number_of(data, "offsets"), number_of(data, "sizes")
    swapped = pickle.NONE + pickle.MARK + text("sizes", first) + text("offsets", second) + pickle.TUPLE
    changed = end.join(parts[:4]) + end[:3] + swapped + end[3:] + end.join(parts[4:])
    chunks = pickle.loads(changed).state_dict_metadata["a"].chunks
    assert (chunks[3].offsets, chunks[4].offsets) == (torch.Size([3, 0]), torch.Size([1, 4]))
    (tmp_path / METADATA).write_bytes(changed)
    with pytest.raises(UserError, match=r"gives no location of `a` at \[1, 4\]"):
        read_index(LocalFolder(tmp_path)).tensor("a")


def test_records_that_change_something_else_are_not_skipped():
    def get(number):
        return pickle.BINGET + bytes([number])

    def item(number):
        added = get(1) + pickle.MARK + get(number) + pickle.BININT1 + bytes([number]) + pickle.SETITEMS
        made = get(0) + pickle.MARK + pickle.TUPLE + pickle.NEWOBJ
        return made + pickle.EMPTY_DICT + pickle.MARK + pickle.NONE + added + pickle.SETITEMS + pickle.BUILD

    data = pickle.PROTO + b"\x02" + pickle.EMPTY_LIST + pickle.MARK
    data += pickle.GLOBAL + b"torch.distributed.checkpoint.planner\nWriteItem\n" + pickle.BINPUT + b"\0"
    data += pickle.EMPTY_DICT + pickle.BINPUT + b"\1" + b"".join(text(f"key {number}", number) for number in range(2, 6))
    data += b"".join(map(item, range(2, 6))) + pickle.APPENDS + pickle.STOP
    expected = {f"key {number}": number for number in range(2, 6)}
    assert loads(data, source="index")[1] == expected
    assert load_index(data, lambda loaded: loaded, source="index")[1] == expected


def test_records_that_no_file_can_mean_end_the_use_of_patterns():
    """Each took a look at thousands: some hundred thousand of them took hours."""
    end = pickle.BININT1 + bytes([LENGTH]) + pickle.SETITEMS + pickle.BUILD  # of where an archive lies
    negative = pickle.BININT + struct.pack("<i", -1) + pickle.SETITEMS + pickle.BUILD
    parts = index(3000).split(end)
    data = end.join(parts[:4]) + negative + negative.join(parts[4:])
    locations = load_index(data, lambda loaded: list(loaded["storage_data"].values()), source="index")
    assert [location["length"] for location in locations[-2990:]] == [-1] * 2990


def objects(names):
    """An index of objects alone, each name under its own number."""
    locations = np.array([(0, LENGTH * number, LENGTH) for number in range(len(names))], np.int64)
    return b"".join(index_document({}, (names, locations, ["__0_0.distcp"])).blocks())


def test_a_number_that_is_given_to_a_second_object_means_that_one_from_then_on(tmp_path):
    names = ["first", "second", "third", "fourth"]
    data = objects(names)
    two, four = number_of(data, "second"), number_of(data, "fourth")
    (tmp_path / METADATA).write_bytes(data.replace(text("fourth", four), text("fourth", two)).replace(
        pickle.LONG_BINGET + struct.pack("<I", four), pickle.LONG_BINGET + struct.pack("<I", two)
    ))  # fmt: skip
    container = read_index(LocalFolder(tmp_path))
    assert container.objects == set(names)
    assert container.object("fourth").offset == 3 * LENGTH
    with pytest.raises(UserError, match="gives no location of `second`"):
        container.object("second")


@pytest.mark.parametrize("damage", [b"\xff\xfe", b"\xc3"])
def test_an_object_whose_name_is_no_text_is_refused(damage):
    data = objects(["first", "second", "third"]).replace(b"third", damage + b"third"[len(damage) :])
    with pytest.raises(UserError, match="is not a readable pickle"):
        load_index(data, lambda loaded: loaded, source="index")
