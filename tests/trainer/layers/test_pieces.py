"""What pieces refuse, and what they do beside a layer's arithmetic."""

from __future__ import annotations

import pytest
import torch
import torch._dynamo

from formats.errors import UserError
from trainer import layers
from trainer.model import GPTModelProvider


def _adapted(**fields):
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.transformer.transformer_block import TransformerBlockSubmodules

    spec = TransformerBlockSubmodules(layer_specs=[get_gpt_layer_local_spec(normalization="RMSNorm")], layer_norm=None)
    return layers.adapt_spec(GPTModelProvider(normalization="RMSNorm", num_attention_heads=2, **fields), spec).layer_specs[0]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"parallel_residual": "both"}, "`model.parallel_residual` is `both`"),
        (
            {"parallel_residual": "one_norm", "pre_layernorms": False},
            "`model.parallel_residual` is `one_norm`, and `model.pre_layernorms` is `False`",
        ),
        ({"qk_layernorm_scope": "all"}, "`model.qk_layernorm_scope` is `all`"),
        (
            {"qk_layernorm": True, "qk_layernorm_scope": "all_heads", "layernorm_zero_centered_gamma": True},
            "`model.qk_layernorm_scope` is `all_heads`, which cannot be done with zero-centred norms or MLA",
        ),
    ],
)
def test_what_cannot_be_built_is_refused(fields, message):
    with pytest.raises(UserError) as error:
        _adapted(**fields)
    assert str(error.value.args[0]) == message


@torch._dynamo.config.patch(disable=True)  # compiling takes longer than all else here
def test_a_fused_sum_of_bias_dropout_and_residual_multiplies_too():
    add = _adapted(residual_multiplier=0.25).submodules.mlp_bda
    output, bias, residual = torch.randn(3, 4, 2, 8)
    for fused in (False, True):
        torch.testing.assert_close(add(False, fused)((output, bias), residual, 0.5), residual + 0.25 * (output + bias))
    torch.manual_seed(0)
    dropped = add(True, False)((output, None), residual, 0.5)
    torch.manual_seed(0)
    torch.testing.assert_close(dropped, residual + torch.nn.functional.dropout(0.25 * output, 0.5))


def test_a_norm_after_a_projection_follows_what_an_adapter_adds():
    from trainer.layers.branch_norms import _normalize

    class Projection(torch.nn.Linear):
        def forward(self, states):
            return super().forward(states), None

    class Adapted(Projection):
        def forward(self, states):
            output, bias = super().forward(states)
            return output + 1, bias

    projection = Projection(8, 8)
    projection.post_layernorm = torch.nn.RMSNorm(8)
    projection.register_forward_hook(_normalize)
    states = torch.randn(3, 8)
    plain = torch.nn.functional.linear(states, projection.weight, projection.bias)
    projection.__class__ = Adapted  # as `trainer.peft` does
    torch.testing.assert_close(projection(states)[0], projection.post_layernorm(plain + 1))


@pytest.mark.parametrize("kind", ["RMSNorm", "LayerNorm"])
def test_a_zero_centred_norm_is_torch_s_with_a_weight_more_by_one(kind):
    from trainer.layers.norms import LocalNorm

    config = GPTModelProvider(normalization=kind, layernorm_zero_centered_gamma=True)
    norm, states = LocalNorm(config, 8), torch.randn(3, 8)
    torch.nn.init.normal_(norm.weight)
    theirs = {"RMSNorm": torch.nn.RMSNorm, "LayerNorm": torch.nn.LayerNorm}[kind](8, eps=1e-5)
    theirs.weight.data = norm.weight.data + 1
    torch.testing.assert_close(norm(states), theirs(states))


def _forward(fields):
    """Whether each parameter is still a leaf after a forward pass on this rank: if not, the backward pass may never end."""
    from tests.trainer.layers.passes import SEQUENCE, SMALL
    from tests.trainer.small import FixedTokens
    from trainer import model, parallel
    from trainer.config import RunConfig
    from trainer.settings.resolve import resolve

    config = RunConfig(model=GPTModelProvider(**{**SMALL, **fields}), dataset=FixedTokens(64, SEQUENCE), mixed_precision="fp32")
    config.train.global_batch_size, config.train.micro_batch_size, config.optimizer.lr = 2, 2, 1e-4
    config = resolve(config, world_size=1, device="cpu").config
    with parallel.session(config, "cpu"):
        (chunk,) = model.build(config.model)
        tokens = torch.arange(SEQUENCE)[None]
        chunk(tokens, tokens, None, labels=tokens)
        return {name: parameter.is_leaf for name, parameter in chunk.named_parameters()}


def test_biases_of_recomputed_feed_forward_parts_stay_parameters(ranks):
    fields = {"add_bias_linear": True, "recompute_granularity": "selective", "recompute_modules": ["mlp"]}
    leaves = ranks.run(_forward, 1, fields)[0]
    assert any(name.endswith("linear_fc2.bias") for name in leaves)
    assert [name for name, leaf in leaves.items() if not leaf] == []
