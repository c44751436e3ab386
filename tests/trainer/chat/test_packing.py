"""Rows of examples: each example once an epoch, in an order that depends on lengths, seed and epoch alone."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.trainer.chat.packed import Drawn
from trainer import segments
from trainer.data.chat import packing
from trainer.data.chat.dataset import ExampleDataset

LENGTH = 64


def real(count=20_000, longest=2048):
    """Lengths as conversations have them."""
    return np.clip(np.random.default_rng(0).lognormal(5.5, 0.9, count).astype(np.int64), 2, longest)


def each(rows):
    return [rows[number].tolist() for number in range(len(rows))]


WAYS = {
    "filled": lambda lengths, capacity: packing.best_fit_decreasing(lengths, capacity=capacity),
    "shuffled": lambda lengths, capacity: packing.best_fit_shuffled(lengths, capacity=capacity, seed=1, epoch=2),
    "in_order": lambda lengths, capacity: packing.best_fit_in_order(lengths, capacity=capacity),
}


@pytest.mark.parametrize("way", WAYS)
@given(lengths=st.lists(st.integers(1, 16), min_size=1, max_size=60))
def test_each_example_is_in_one_row_and_no_row_is_too_long(way, lengths):
    lengths = np.array(lengths)
    rows = WAYS[way](lengths, 16)
    assert sorted(rows.examples.tolist()) == list(range(len(lengths)))
    assert all(0 < lengths[row].sum() <= 16 for row in each(rows))


@given(lengths=st.lists(st.integers(1, 16), min_size=1, max_size=60))
def test_best_fit_is_the_textbooks(lengths):
    """Every example, the longest first, goes to the fullest row that has room for it."""
    room, rows = [], []
    for example in sorted(range(len(lengths)), key=lambda number: -lengths[number]):
        fitting = [number for number, left in enumerate(room) if left >= lengths[example]]
        if not fitting:
            fitting, room, rows = [len(room)], [*room, 16], [*rows, []]
        best = min(fitting, key=lambda number: room[number])
        room[best] -= lengths[example]
        rows[best].append(example)
    packed = packing.best_fit_decreasing(np.array(lengths), capacity=16)
    assert sorted(16 - np.array(lengths)[row].sum() for row in each(packed)) == sorted(room)


def test_rows_are_nearly_full():
    lengths = real()
    for way, least in (("filled", 0.998), ("shuffled", 0.99), ("in_order", 0.99)):
        assert packing.efficiency(lengths, len(WAYS[way](lengths, 2048)), capacity=2048) > least


def test_an_epoch_has_the_same_rows_every_time_and_other_epochs_and_seeds_have_others():
    lengths = real(500)
    first, again, epoch, seed = (
        packing.best_fit_shuffled(lengths, capacity=2048, seed=seed, epoch=epoch)
        for seed, epoch in ((1, 0), (1, 0), (1, 1), (2, 0))
    )
    assert each(first) == each(again)
    assert each(first) != each(epoch)
    assert each(first) != each(seed)


def test_rows_in_another_order_are_the_same_rows():
    rows = WAYS["filled"](real(300), 2048)
    order = np.random.default_rng(3).permutation(len(rows))
    assert each(rows.permuted(order)) == [rows[number].tolist() for number in order]


def dataset(count=40, **settings):
    settings = {"sequence_length": LENGTH, "packed": True, "seed": 5, **settings}
    return ExampleDataset(Drawn(count), np.arange(count), **settings)


def split_up(sample):
    """The examples of a row: tokens, and which of them are learned; padding last."""
    marks = sample["segment_ids"]
    for number in range(int(marks.max()) + 1):
        positions = (marks == number).nonzero().flatten()
        assert positions.tolist() == list(range(int(positions[0]), int(positions[-1]) + 1))
        yield {name: part[positions] for name, part in sample.items()}


@pytest.mark.parametrize("multiple", [1, 4])
def test_a_row_holds_whole_examples_and_no_label_crosses_an_end(multiple):
    made = dataset(multiple=multiple)
    made.take(len(made._epoch(0)))
    store, seen = Drawn(40), []
    for sample in (made[number] for number in range(len(made))):
        assert {name: part.dtype for name, part in sample.items()} == {
            "tokens": torch.int64, "labels": torch.int64, "position_ids": torch.int64, "loss_mask": torch.float32,
            "segment_ids": torch.int32,
        }  # fmt: skip
        assert {len(part) for part in sample.values()} == {LENGTH}
        for part, example in zip(split_up(sample), made._numbers[made._epoch(0)[len(seen)]].tolist(), strict=True):
            tokens, trained = store[example]
            count = len(tokens)
            assert len(part["tokens"]) == -(-count // multiple) * multiple
            assert part["tokens"][:count].tolist() == tokens.tolist()
            assert part["labels"][: count - 1].tolist() == tokens[1:].tolist()
            assert part["loss_mask"].tolist() == [*trained[1:].astype(float), *[0.0] * (len(part["tokens"]) - count + 1)]
            assert part["position_ids"].tolist() == list(range(len(part["tokens"])))
        padding = sample["segment_ids"] == segments.PADDING
        assert not sample["loss_mask"][padding].any()
        seen.append(made._epoch(0)[len(seen)].tolist())
    assert sorted(example for row in seen for example in row) == list(range(40))


def test_without_packing_a_row_is_one_example_and_long_ones_are_cut():
    made = dataset(packed=False, sequence_length=16).take(40)
    assert len(made._epoch(0)) == 40
    row = made._epoch(0)[3].tolist()
    tokens = Drawn(40)[row[0]][0][:16]
    assert made[3]["tokens"].tolist() == [*tokens.tolist(), *[0] * (16 - len(tokens))]
    assert "segment_ids" not in made[3]


def same(first, second):
    return all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("packed", [True, False])
def test_a_sample_is_the_same_however_many_are_asked_for_and_in_other_processes(packed):
    short, long = dataset(packed=packed).take(30), dataset(packed=packed).take(90)
    away = pickle.loads(pickle.dumps(long))
    assert long._epoch_ends[0] < 45  # there are several epochs
    for number in (29, 0, 17):
        assert same(short[number], long[number])
        assert same(away[number], long[number])
    assert same(long[80], away[80])
    with pytest.raises(IndexError):
        short[30]


def test_every_epoch_has_each_example_once_whatever_number_of_rows_it_has():
    made = dataset(count=60, sequence_length=30).take(400)
    assert len({end - start for start, end in zip([0, *made._epoch_ends], made._epoch_ends, strict=False)}) > 1
    first = Drawn(60)
    expected = sorted(tuple(first[number][0].tolist()) for number in range(60))
    start = 0
    for end in made._epoch_ends[:-1]:
        rows = [part["tokens"] for number in range(start, end) for part in split_up(made[number])]
        assert sorted(tuple(part.tolist()) for part in rows) == expected
        start = end


def test_evaluation_sees_the_same_rows_in_the_same_order_and_begins_anew():
    made = dataset(shuffled=False).take(100)
    rows = made._epoch_ends[0]
    assert rows < 50
    assert all(same(made[number], made[number + rows]) for number in range(rows))


def test_segments_are_found_row_by_row():
    ids = torch.tensor([[0, 0, 1, 1, 1, -1], [0, 1, 1, 1, 1, 1]], dtype=torch.int32)
    packed = segments.find_segments(ids)
    assert packed.cu_seqlens.tolist() == [0, 2, 5, 6, 7, 12]
    assert packed.cu_seqlens.dtype == np.int32
    assert (packed.num_tokens, packed.sum_squared_lengths, packed.max_seqlen) == (2 + 3 + 1 + 5, 4 + 9 + 1 + 25, 5)
    full = segments.find_segments(torch.zeros(2, 6, dtype=torch.int32))  # one example fills each row
    assert full.cu_seqlens.tolist() == [0, 6, 12]


def test_a_token_is_shown_those_before_it_in_its_own_example():
    shown = ~segments.attention_mask(torch.tensor([[0, 0, 1, 1, -1]], dtype=torch.int32))
    assert shown.shape == (1, 1, 5, 5)
    assert shown[0, 0].int().tolist() == [
        [1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [0, 0, 1, 0, 0], [0, 0, 1, 1, 0], [0, 0, 0, 0, 1],
    ]  # fmt: skip


def test_rows_of_many_examples_are_kept_in_files(tmp_path, monkeypatch):
    from trainer.data import cache

    plain = dataset().take(90)
    monkeypatch.setattr(cache, "MIN_CACHED_ENTRIES", 1)
    kept = dataset(folder=tmp_path).take(90)
    assert len(list(tmp_path.iterdir())) == len(kept._epoch_ends)
    times = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    again = dataset(folder=tmp_path).take(90)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == times
    for number in (0, 30, 89):
        assert same(plain[number], kept[number])
        assert same(plain[number], again[number])
