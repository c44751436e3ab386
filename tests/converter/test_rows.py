"""Row tables cover each row once; layouts tile; a plan accounts for everything."""

from __future__ import annotations

from math import prod

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from converter import UserError, rows
from converter.layout import Layout, shards
from converter.model import Model
from converter.plan import TensorPlan, pieces
from converter.rules import replicated, sections
from converter.tables import Tables
from formats.chunks import tiles
from formats.spec import DTYPES, TensorSpec, extent


def model(groups, per_group, head_dim):
    return Model(layers=1, hidden=8, heads=groups * per_group, groups=groups, head_dim=head_dim, ffn=8, vocab=8,
                 padded_vocab=8, tied=False)  # fmt: skip


sizes = st.integers(1, 6)


def starts_and_sizes(regions, *, dims=None):
    """Regions as `tiles` takes them: [count, dims] of both."""
    starts = np.array([[part.start for part in region] for region in regions], np.int64).reshape(len(regions), dims or -1)
    return starts, np.array([extent(region) for region in regions], np.int64).reshape(starts.shape)


@given(sizes, sizes, sizes)
def test_interleaved_rows_are_covered_once_and_read_back_from_right_to_left(groups, per_group, head_dim):
    attention = model(groups, per_group, head_dim)
    parts = attention.queries, attention.keys, attention.keys
    runs = list(rows.interleaved_by_group(parts, attention))
    assert rows.covered(iter(runs), sum(parts))
    sources = [np.arange(count) + 1000 * part for part, count in enumerate(parts)]
    fused = np.concatenate([sources[run.part][run.src_row : run.src_row + run.rows] for run in runs])
    back = [np.full(count, -1) for count in parts]
    for run in runs:
        back[run.part][run.src_row : run.src_row + run.rows] = fused[run.dst_row : run.dst_row + run.rows]
    assert all(np.array_equal(a, b) for a, b in zip(sources, back, strict=True))


@given(sizes, sizes, sizes)
def test_interleaving_equals_megatrons_reshape(groups, per_group, head_dim):
    attention = model(groups, per_group, head_dim)
    q, k, v = (np.arange(n) + 1000 * i for i, n in enumerate((attention.queries, attention.keys, attention.keys)))
    by_group = [part.reshape(groups, -1) for part in (q, k, v)]
    runs = rows.interleaved_by_group((attention.queries, attention.keys, attention.keys), attention)
    fused = np.concatenate([(q, k, v)[run.part][run.src_row : run.src_row + run.rows] for run in runs])
    assert np.array_equal(fused, np.concatenate(by_group, axis=1).reshape(-1))


def test_a_table_with_a_hole_or_an_overlap_is_not_covered():
    assert not rows.covered(iter([rows.RowRange(0, 0, 0, 2), rows.RowRange(0, 2, 3, 2)]), 5)
    assert not rows.covered(iter([rows.RowRange(0, 0, 0, 2), rows.RowRange(0, 2, 1, 2)]), 5)
    assert not rows.covered(iter([rows.RowRange(0, 0, 0, 9)]), 5)


@given(st.sampled_from([1, 2, 4]), st.sampled_from([1, 2]), st.sampled_from([None, 0, 1]))
def test_shards_tile_a_tensor(tp, blocks, cut):
    shape = 24, 16
    held = shards(shape, cut, blocks, tp)
    assert tiles(shape, *starts_and_sizes([region for region, _ in held]))
    assert {rank for _, rank in held} == ({0} if cut is None else set(range(tp)))


@given(st.lists(st.integers(0, 4), min_size=4, max_size=4).filter(any))
def test_layers_go_to_stages_in_megatrons_order(stages):
    layout = Layout(1, 2, 2, tuple(stages))
    expected = [number % 2 for number, count in enumerate(stages) for _ in range(count)]
    assert [layout.stage(layer) for layer in range(sum(stages))] == expected
    assert (layout.stage(-1), layout.stage(sum(stages))) == (0, 1)


@given(st.lists(st.integers(1, 9), min_size=1, max_size=4), st.integers(4, 300), st.booleans())
def test_pieces_are_runs_of_bytes_in_order_and_none_exceeds_the_limit(shape, limit, cast):
    """Whatever the axis: a row of a tensor of stacked matrices is a matrix, and one row may be as large as any."""
    dtypes = DTYPES["bf16"], DTYPES["fp32" if cast else "bf16"]
    tensor_plan = TensorPlan(
        TensorSpec("t", tuple(shape), dtypes[0]),
        (TensorSpec("s", (3 + shape[0], *shape[1:]), dtypes[1]),),
        [rows.RowRange(0, 3, 0, shape[0])],
    )
    elements = np.arange(prod(shape)).reshape(shape)
    all_pieces = list(pieces([tensor_plan], limit=limit))
    assert np.concatenate([elements[piece.region].ravel() for piece in all_pieces]).tolist() == list(range(elements.size))
    assert max(elements[piece.region].size for piece in all_pieces) * dtypes[1].itemsize <= limit
    source = np.concatenate([np.full((3, *shape[1:]), -1), elements])
    for piece in all_pieces:
        [(_, region, band)] = piece.copies()
        assert np.array_equal(source[region], elements[piece.region][band])
        assert piece.nbytes == elements[piece.region].size * 2


def test_a_stack_of_experts_is_cut_below_the_limit():
    tensor_plan = TensorPlan(TensorSpec("experts", (128, 2880, 5760), DTYPES["bf16"]))
    sizes = [piece.nbytes for piece in pieces([tensor_plan], limit=4 << 20)]
    assert max(sizes) <= 4 << 20
    assert sum(sizes) == tensor_plan.spec.nbytes
    assert len(sizes) == 128 * 8


def test_a_tiling_of_many_dimensions_is_judged_at_once():
    """Slices along the last dimension, each halved along another: cut into slabs, it would take 2**40 of them."""
    count = 40
    whole = (slice(0, 2),) * count
    halves = [
        (*whole[:number], slice(half, half + 1), *whole[number + 1 :], slice(number, number + 1))
        for number in range(count)
        for half in range(2)
    ]
    shape = (*(2,) * count, count)
    assert tiles(shape, *starts_and_sizes(halves))
    assert not tiles(shape, *starts_and_sizes([*halves[:-1], halves[0]]))


shards_of_six = st.lists(st.tuples(st.integers(0, 5), st.integers(1, 6), st.integers(0, 5), st.integers(1, 6)), max_size=6)


@given(shards_of_six)
def test_tiling_is_judged_as_counting_elements_judges_it(corners):
    regions = [(slice(a, min(6, a + h)), slice(b, min(6, b + w))) for a, h, b, w in corners]
    counted = np.zeros((6, 6), int)
    for region in regions:
        counted[region] += 1
    assert tiles((6, 6), *starts_and_sizes(regions, dims=2)) == bool((counted == 1).all())


def test_every_row_of_a_part_is_taken_once_or_it_is_not_exhausted():
    whole, half = rows.RowRange(0, 0, 0, 4), rows.RowRange(0, 1, 4, 4, 2)
    assert rows.exhausted([rows.RowRange(0, 4, 0, 2), whole], 6)
    assert rows.exhausted([rows.RowRange(0, 0, 0, 4, 2), half], 8)
    for wrong in ([whole], [whole, whole, whole], [whole, rows.RowRange(0, 5, 0, 3)], [whole, half], [half, half], []):
        assert not rows.exhausted(wrong, 8)


@given(sizes, sizes, st.integers(2, 4))
def test_sections_and_shares_are_plain_slices(groups, size, count):
    model = Model(g=groups)
    parts = tuple(groups * (size + number) for number in range(count))
    whole = np.arange(sum(parts))
    by_group = whole.reshape(groups, -1)
    starts = np.cumsum([0, *parts])
    for number in range(count):
        (taken,) = rows.section(number)(parts, model)
        assert (taken.part, taken.src_row, taken.rows) == (number, 0, parts[number])
        shares = [whole[r.src_row : r.src_row + r.rows] for r in rows.share(number, "g")(parts, model)]
        inside = slice(starts[number] // groups, starts[number + 1] // groups)
        assert np.array_equal(np.concatenate(shares), by_group[:, inside].reshape(-1))
    assert rows.exhausted([r for number in range(count) for r in rows.share(number, "g")(parts, model)], sum(parts))


def test_a_rule_that_leaves_rows_out_on_either_side_is_refused():
    model = Model(layers=0, vocab=8, padded_vocab=8, a=2, b=3)
    lacks_a_section = list(sections("x.{one,two}", "x", ("a", "b")))[:1]
    takes_rows_twice = [*sections("x.{one,two}", "x", ("a", "b")), replicated("y", "x", "a")]
    for wrong in (lacks_a_section, takes_rows_twice):
        with pytest.raises(UserError, match="does not take each row of `x` once with the sizes of this model"):
            list(Tables(wrong, model))
    assert len(list(Tables([*sections("x.{one,two}", "x", ("a", "b"))], model))) == 2
