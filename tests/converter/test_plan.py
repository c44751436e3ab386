"""A plan there and back is the identity, covers every row once, and tiles at every layout, however it is cut into pieces."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from math import prod

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from converter import UserError
from converter.conversion_plan import partial_directory
from converter.families import llama
from converter.layout import make_layout
from converter.model import Model
from converter.plan import pieces
from converter.planner import huggingface_tensors, sharded, to_huggingface, to_megatron
from formats.chunks import tiles
from formats.spec import DTYPES, TensorSpec, extent
from tests.converter.test_rows import starts_and_sizes

few = st.integers(1, 3)


@st.composite
def models(draw):
    """A Llama of any small shape, with or without biases, tied or not, its vocabulary padded or not."""
    groups, per_group, vocab = draw(few), draw(few), draw(st.integers(1, 9))
    multiple = draw(st.sampled_from([1, 4, 6]))
    return Model(
        layers=draw(few), hidden=draw(few), heads=groups * per_group, groups=groups, head_dim=draw(few), ffn=draw(few) * 2,
        vocab=vocab, padded_vocab=-(-vocab // multiple) * multiple, tied=draw(st.booleans()), attention_bias=draw(st.booleans()),
        mlp_bias=draw(st.booleans()),
    )  # fmt: skip


def source(model):
    """The Hugging Face tensors of a model, by its rules."""
    tensors = huggingface_tensors(llama.RULES, model, dict.fromkeys(range(1000)))
    return {name: TensorSpec(name, shape, DTYPES["fp32"]) for name, shape in tensors}


def carried_out(tensor_plans, values, limit):
    """Every making, piece by piece: whole rows, zero where no copy says otherwise."""
    made = {tensor_plan.spec.name: np.full(tensor_plan.spec.shape, np.nan, np.float32) for tensor_plan in tensor_plans}
    for piece in pieces(tensor_plans, limit=limit):
        band = np.zeros(extent(piece.region), np.float32)
        for copy, region, rows in piece.copies():
            band[rows] = values[copy.source][region]
        made[piece.tensor.spec.name][piece.region] = band
    return made


def numbered(specs):
    """Each element another number, none of them zero."""
    ends = np.cumsum([0, *(prod(spec.shape) for spec in specs.values())])
    return {s.name: np.arange(a + 1, a + 1 + prod(s.shape), dtype=np.float32).reshape(s.shape)
            for s, a in zip(specs.values(), ends, strict=False)}  # fmt: skip


@given(models(), st.integers(1, 300), st.integers(1, 300))
def test_there_and_back_is_the_identity_whatever_the_pieces(model, one_limit, other_limit):
    specs = source(model)
    values = numbered(specs)
    plan = to_megatron(llama.RULES, (), model, specs, dtype="keep")
    megatron = carried_out(plan.tensors, values, one_limit)
    assert all(np.array_equal(array, megatron[name]) for name, array in carried_out(plan.tensors, values, other_limit).items())
    stored = {tensor_plan.spec.name: tensor_plan.spec for tensor_plan in plan.tensors}
    back = carried_out(to_huggingface(llama.RULES, model, stored, dtype="keep").tensors, megatron, other_limit)
    assert back.keys() == values.keys()
    assert all(np.array_equal(back[name], values[name]) for name in values)


@given(models())
def test_every_source_row_goes_to_one_place_and_every_target_row_comes_from_one(model):
    specs = source(model)
    plan = to_megatron(llama.RULES, (), model, specs, dtype="keep")
    taken = Counter((c.source, row) for m in plan.tensors for c in m.copies for row in range(c.src_row, c.src_row + c.rows))
    assert taken == Counter((spec.name, row) for spec in specs.values() for row in range(spec.shape[0]))
    for tensor_plan in plan.tensors:
        filled = [row for copy in tensor_plan.copies for row in range(copy.dst_row, copy.dst_row + copy.rows)]
        padded = (
            model.vocab if tensor_plan.spec.shape[0] == model.padded_vocab and "layers" not in tensor_plan.spec.name else None
        )
        assert filled == list(range(len(filled)))
        assert len(filled) in (tensor_plan.spec.shape[0], padded, 0)
        assert bool(filled) == (tensor_plan.spec.name not in plan.zero)


def test_a_tensor_parallel_size_that_does_not_divide_the_rows_of_query_key_and_value_is_refused():
    model = Model(layers=1, hidden=1, heads=3, groups=1, head_dim=1, ffn=3, vocab=1, padded_vocab=3, tied=True)
    with pytest.raises(
        UserError, match="size 3 does not divide the 5 rows of the model's query, key and value projection"
    ) as error:
        make_layout(model, tp=3, pp=1, vpp=1, pp_layout=None)
    assert error.value.hint == "megatron-core takes 1 or a multiple of 1 that divides them"


@given(models(), st.data())
def test_chunks_tile_every_tensor_at_every_layout_that_is_taken(model, data):
    tp, pp, vpp = (data.draw(st.integers(1, 3)) for _ in range(3))
    multiple = tp * data.draw(few)
    model = model.replace(padded_vocab=-(-model.vocab // multiple) * multiple)
    held = data.draw(st.lists(st.integers(0, pp * vpp - 1), min_size=model.layers, max_size=model.layers))
    stages = data.draw(st.sampled_from([None, [held.count(stage) for stage in range(pp * vpp)]]))
    plan = to_megatron(llama.RULES, (), model, source(model), dtype="keep")
    try:
        layout = make_layout(model, tp=tp, pp=pp, vpp=vpp, pp_layout=stages)
    except UserError:
        return
    assert sum(layout.stages) == model.layers
    for spec, chunks in sharded(plan, layout):
        assert tiles(spec.shape, *starts_and_sizes([region for region, _ in chunks]))
        ranks = {rank for _, rank in chunks}
        assert {rank // tp for rank in ranks} <= set(range(pp))
        assert len({rank // tp for rank in ranks}) == 1, "a tensor lies in one stage"
        assert len(ranks) in (1, tp)


@given(models(), st.data())
def test_a_source_that_lacks_or_holds_one_tensor_more_is_refused(model, data):
    specs = source(model)
    name = data.draw(st.sampled_from(sorted(specs)))
    without = {other: spec for other, spec in specs.items() if other != name}
    renamed = {**specs, f"{name}.x": specs[name]}
    wider = {**specs, name: replace(specs[name], shape=(*specs[name].shape[:-1], specs[name].shape[-1] + 1))}
    for wrong in (without, renamed, wider):
        with pytest.raises(UserError):
            to_megatron(llama.RULES, (), model, wrong, dtype="keep")


def test_plans_that_differ_in_rows_alone_are_written_into_different_directories(tmp_path):
    sizes = {
        "attention_bias": False,
        "mlp_bias": False,
        "layers": 2,
        "hidden": 4,
        "ffn": 4,
        "vocab": 4,
        "padded_vocab": 4,
        "tied": False,
    }
    grouped = [Model(heads=4, groups=2, head_dim=2, **sizes), Model(heads=2, groups=1, head_dim=4, **sizes)]
    assert source(grouped[0]) == source(grouped[1])
    plans = [to_megatron(llama.RULES, (), model, source(model), dtype="keep") for model in (*grouped, *grouped)]
    names = [partial_directory(tmp_path / "out", plan.tensors, {"tp": 1}).name for plan in plans]
    assert names[:2] == names[2:]
    assert names[0] != names[1]
    assert partial_directory(tmp_path / "out", plans[0].tensors, {"tp": 2}).name not in names
