"""Layers per stage as text: as numbers, and in megatron-core's notation, which megatron-core itself judges here."""

from __future__ import annotations

import contextlib
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from converter import UserError
from converter.pipeline_layout import format_layout, layers_per_stage, parse_layout

STAGES = st.lists(st.integers(0, 12), min_size=1, max_size=9)


def by_megatron(text: str, pp: int = 1) -> list[int]:
    """The layers of each stage as megatron-core reads them, first virtual stage first."""
    from megatron.core.transformer.enums import LayerType
    from megatron.core.transformer.pipeline_parallel_layer_layout import PipelineParallelLayerLayout

    layout = PipelineParallelLayerLayout(text, pp)
    virtual = layout.virtual_pipeline_model_parallel_size
    count = layout.flatten_layout.count
    layout.validate_layer_layout(count(LayerType.decoder), count(LayerType.mtp) or None)
    return [layout.layout[rank][stage].count(LayerType.decoder) for stage in range(virtual) for rank in range(pp)]


@given(stages=STAGES)
@pytest.mark.parametrize("mtp", [0, 2])
def test_what_is_written_is_read_back_by_megatron_core_and_here(stages, mtp):
    text = format_layout(stages, mtp=mtp)
    assert parse_layout(text) == by_megatron(text, len(stages)) == stages
    assert parse_layout(",".join(map(str, stages))) == stages


@pytest.mark.parametrize(
    ("text", "pp"),
    [
        ("Et*9|t*9|t*8|t*6L", 4), ("Ettt|(tt|)*29,t|L", 32), ("Et|(t|)*2ttL", 2), ("Et,t|t*2|,tt|t*2,L", 2), ("E|t*4|L", 3),
        ("Et|*2tL", 3), ("E(tt)*2L", 1), ("EL", 1), ("E(|t)*3L", 4), ("Et*2|t*0|tL", 3),
        ("Et*3|(t*4|)*14t*2mL", 16), ("EtmmL", 1), ("Et|m*2L", 2),
    ],
)  # fmt: skip
def test_a_layout_is_read_as_megatron_core_reads_it(text, pp):
    assert parse_layout(text) == by_megatron(text, pp)


@pytest.mark.parametrize("text", ["*-*|-*-", "MM*-|*E/*-/*-", "G", "M||*", "+E|+-+E"])
def test_a_pattern_of_a_hybrid_model_has_a_letter_for_each_layer(text):
    from megatron.core.models.hybrid import hybrid_layer_allocation as of_megatron

    stages = of_megatron.parse_hybrid_pattern(text).main_pattern.split("|")
    assert parse_layout(text) == [len(of_megatron.validate_segment_layers(stage)) for stage in stages]


@pytest.mark.parametrize(
    ("text", "message", "hint"),
    [
        ("Et*2|tx|tL", "stage 2 of the pipeline layout, `tx`, has `x`", "`E` is the embedding"),
        ("Et|m|L", "stage 2 of the pipeline layout, `m`, has `m`", "`E` is the embedding"),
        ("Et|tm|L", "stage 2 of the pipeline layout, `tm`, has `m`", "`m`, before `L`, is a layer that predicts"),
        ("Et|mtL", "stage 2 of the pipeline layout, `mtL`, has `m`", "`m`, before `L`"),
        ("Et*|tL", "stage 1 of the pipeline layout, `Et*`, has `*`", "`E` is the embedding"),
        ("Et|(t|t|tL", "stage 2 of the pipeline layout, `(t`, has `(`", "`E` is the embedding"),
        ("t*2|t*2L", "stage 1 of the pipeline layout, `t*2`, does not begin with `E`", "holds the embedding"),
        ("Et*2|t*2", "stage 2 of the pipeline layout, `t*2`, does not end with `L`", "holds the output layer"),
        ("E", "stage 1 of the pipeline layout, `E`, does not end with `L`", "holds the output layer"),
        ("|E", "stage 1 of the pipeline layout, ``, does not begin with `E`", "holds the embedding"),
        ("Et|Et|tL", "stage 2 of the pipeline layout, `Et`, has `E`", "`E` comes first, and only there"),
        ("Et|tL|tL", "stage 2 of the pipeline layout, `tL`, has `L`", "`L` comes last, and only there"),
        ("EEt|tL", "stage 1 of the pipeline layout, `EEt`, has `E`", "`E` comes first"),
        ("Et|tLL", "stage 2 of the pipeline layout, `tLL`, has `L`", "`L` comes last"),
        ("3,x", "pipeline layout `3,x` is not a list of layers per stage", "for example `9,9,8,6` or `Et*9|t*9|t*8|t*6L`"),
        ("", "pipeline layout `` is not a list of layers per stage", "for example"),
        ("E(t|)*99999|L", "pipeline layout `E(t|)*99999|L` is too long", "for example"),
        ("E|*999999L", "pipeline layout `E|*999999L` is too long", "for example"),
    ],
)  # fmt: skip
def test_a_wrong_layout_is_refused_by_its_stage(text, message, hint):
    with pytest.raises(UserError, match=f"^{re.escape(message)}") as refused:
        parse_layout(text)
    assert hint in refused.value.hint


@given(st.text("ELtm|*()0123456789,x ", max_size=30))
def test_any_text_is_read_or_refused(text):
    with contextlib.suppress(UserError):
        assert all(count >= 0 for count in parse_layout(text))


@pytest.mark.parametrize(("text", "mtp"), [
    ("Et|tmL", 1), ("Et|tL", 1), ("Et|tm*2L", 2), ("Et|t(m)*2L", 2), ("Et|tmmL", 2), ("1,1", 2), ("*-|*-/*-", 1), ("*-|*-", 1),
    ("Et|t*2,m,mL", 2),
])  # fmt: skip
def test_layers_of_multi_token_prediction_are_those_of_the_model_or_left_out(text, mtp):
    assert layers_per_stage(text, mtp=mtp) == parse_layout(text)


@pytest.mark.parametrize(("text", "mtp", "number"), [
    ("Et|tmL", 0, 1), ("Et|tmL", 2, 1), ("Et|tm*3L", 1, 3), ("Et|t(m)*2L", 1, 2), ("*-|*-/*-/*-", 1, 2), ("*-|*-/*-", 0, 1),
])  # fmt: skip
def test_another_number_of_layers_of_multi_token_prediction_is_refused(text, mtp, number):
    with pytest.raises(UserError) as refused:
        layers_per_stage(text, mtp=mtp)
    assert refused.value.args[0] == (
        f"pipeline layout `{text}` has {number} layers of multi-token prediction, the model has {mtp}"
    )
    assert refused.value.hint == "each is an `m` before `L`, or a `/` in a pattern; a layout may leave them out"


def test_numbers_stay_numbers():
    assert layers_per_stage([3, 1]) == [3, 1]
    assert layers_per_stage(None) is None
    assert layers_per_stage("Et*3|tL") == [3, 1]
