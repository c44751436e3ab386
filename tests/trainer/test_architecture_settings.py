"""A model's own pieces refuse, by name, settings with which they would compute something else."""

from __future__ import annotations

import pytest
import torch
from megatron.core.transformer.enums import AttnBackend

from formats.errors import UserError
from tests.trainer.settings import CP, resolved, settings
from trainer.layers import xielu
from trainer.settings import values
from trainer.settings.resolve import resolve

ALIBI = {"model__position_embedding_type": "alibi", "model__alibi": {}}
CAPPED = {"model__attn_logit_softcapping": 50.0}
SLIDING = {"model__sliding_rope": {"rope_type": "default", "rope_theta": 1e4}, "model__window_size": (7, 0)}
YARN = {
    "model__position_embedding_type": "yarn",
    "model__yarn_original_max_position_embeddings": 64,
    "model__yarn_rotary_scaling_factor": 4.0,
}
NET = {"model__experimental_attention_variant": "gated_delta_net", "model__linear_attention_freq": 2}
REFUSED = [
    (
        {"model__experimental_attention_variant": "dsa"},
        (
            "`model.experimental_attention_variant` is `dsa`, and `model.multi_latent_attention` is `False`\n\n"
            "hint: leave it out: sparse attention is one of latent attention"
        ),
    ),
    (
        {**NET, "model__post_layernorms": True},
        (
            "`model.post_layernorms` is `True`, which cannot be done in a model with gated delta nets\n\n"
            "hint: set `model.post_layernorms=False`"
        ),
    ),
    (
        {"model__exact_sequence_length": 64},
        (
            "`dataset.sequence_length` is `128`, and this model's positions are computed exactly up to `64` tokens\n\n"
            "hint: set `dataset.sequence_length=64` or less"
        ),
    ),
    (
        {"model__alibi": {"bias_max": 8.0}},
        (
            "`model.position_embedding_type` is `rope`, and `model.alibi` is `{'bias_max': 8.0}`\n\n"
            "hint: set both, or neither: `model.alibi={}` has the usual slopes"
        ),
    ),
    (
        {**ALIBI, "model__alibi": {"slope": 8.0}},
        "`model.alibi` has `slope`\n\nhint: it may have `bias_max` and `scale`",
    ),
    (
        {"model__position_offset": 2},
        (
            "`model.position_offset` is `2`, and `model.position_embedding_type` is `rope`\n\n"
            "hint: only learned positions (`learned_absolute`) begin at another number"
        ),
    ),
    (
        {"model__position_embedding_type": "yarn"},
        (
            "`model.position_embedding_type` is `yarn`, and `model.yarn_original_max_position_embeddings` is `None`\n\n"
            "hint: set the length of sequences before the scaling"
        ),
    ),
    (
        {**YARN, "model__rotary_percent": 0.5},
        (
            "`model.rotary_percent` is `0.5`, and with `yarn` megatron-core turns whole heads\n\n"
            "hint: leave `model.position_embedding_type=yarn` out"
        ),
    ),
    (
        {**YARN, "model__position_embedding_type": "rope"},
        (
            "`model.yarn_rotary_scaling_factor` is `4.0`, and `model.position_embedding_type` is `rope`\n\n"
            "hint: set `model.position_embedding_type=yarn`, or leave the factor out"
        ),
    ),
    (
        {"model__rope_parameters": {"rope_type": "spiral"}},
        (
            "`model.rope_parameters` has the `rope_type` `spiral`\n\n"
            "hint: choose one of: default, dynamic, linear, llama3, longrope, yarn"
        ),
    ),
    (
        {**SLIDING, "model__window_size": None},
        "`model.sliding_rope` is set, and `model.window_size` is not: no layer slides\n\nhint: leave `model.sliding_rope` out",
    ),
    (
        {**SLIDING, "model__position_embedding_type": "none"},
        "`model.sliding_rope` is set, and `model.position_embedding_type` is `none`\n\nhint: leave one of them out",
    ),
    (
        {**CAPPED, CP: 2},
        (
            "`model.attn_logit_softcapping` is `50.0`, which does not work with context parallelism "
            "(`model.context_parallel_size=2`)\n\nhint: set `model.context_parallel_size=1`"
        ),
    ),
    (
        {**CAPPED, "model__fp8_dot_product_attention": True},
        (
            "`model.attn_logit_softcapping` is `50.0`, which attention in FP8 (`model.fp8_dot_product_attention`) does not do\n\n"
            "hint: leave `model.fp8_dot_product_attention` out"
        ),
    ),
    (
        {**CAPPED, "model__attention_backend": AttnBackend.fused},
        (
            "`model.attn_logit_softcapping` is `50.0`, and `model.attention_backend` is `fused`: cuDNN does not cap scores\n\n"
            "hint: set `model.attention_backend=auto`"
        ),
    ),
    (
        {"model__qk_layernorm_after_rope": True},
        (
            "`model.qk_layernorm_after_rope` is `True`, and `model.qk_layernorm` is `False`: there are no norms of query and "
            "key\n\nhint: set `model.qk_layernorm=true`"
        ),
    ),
    (
        {**YARN, "model__apply_rope_fusion": True},
        (
            "`model.apply_rope_fusion` is `True`: the fused kernel leaves out the attention factor of `yarn` and `longrope`\n\n"
            "hint: leave `model.apply_rope_fusion` out"
        ),
    ),
    (
        {"model__activation_func": torch.nn.functional.gelu, "model__bias_activation_fusion": True},
        (
            "`model.bias_activation_fusion` is `True`: the fused kernel computes SwiGLU, or GELU by tanh in place of GELU\n\n"
            "hint: leave `model.bias_activation_fusion` out"
        ),
    ),
    (
        {"model__activation_func": xielu.xielu},
        (
            "`model.activation_func` is `xielu`, which neither gates nor experts have here\n\n"
            "hint: set `model.gated_linear_unit=false`, and no experts"
        ),
    ),
]


@pytest.mark.parametrize(("changes", "message"), REFUSED)
def test_what_a_piece_does_not_work_with_is_refused(changes, message):
    with pytest.raises(UserError) as refused:
        resolve(settings(**changes), world_size=2, device="gpu")
    assert str(refused.value) == message


@pytest.mark.parametrize(("name", "changes"), [("alibi", ALIBI), ("sliding_rope", SLIDING)])
def test_pieces_of_attention_are_refused_with_context_parallelism(name, changes):
    with pytest.raises(UserError, match=rf"`model\.{name}` is .* does not work with context parallelism"):
        resolve(settings(**changes, **{CP: 2}), world_size=2, device="gpu")


@pytest.mark.parametrize(
    ("function", "gated", "fused"),
    [("silu", True, True), ("silu", False, False), ("gelu", False, False), ("fast_gelu", True, False), ("relu", False, False)],
)
def test_a_fused_activation_is_used_where_it_computes_the_same(function, gated, fused):
    chosen = {"model__activation_func": values.activation(function), "model__gated_linear_unit": gated, "model__hf_config": {}}
    model = resolved(**chosen).config.model
    assert bool(model.bias_activation_fusion) is fused


def test_fused_rotary_embeddings_are_used_where_they_compute_the_same():
    assert resolved().config.model.apply_rope_fusion
    assert not resolved(**YARN, model__hf_config={}).config.model.apply_rope_fusion
