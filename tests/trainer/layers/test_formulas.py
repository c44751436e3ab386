"""Formulas of rotary embeddings, slopes and activations are those of transformers."""

from __future__ import annotations

import pytest
import torch

from trainer.layers import rope, scores
from trainer.layers.xielu import XIELU, xielu
from trainer.settings import values

LONG = {
    "rope_type": "longrope",
    "short_factor": [1.0, 1.1, 1.5, 2.0, 3.0, 4.0],
    "long_factor": [1.0, 2.0, 4.0, 8.0, 16.0, 32.0],
    "original_max_position_embeddings": 64,
    "factor": 4.0,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
KINDS = {
    "linear": {"rope_type": "linear", "factor": 4.0},
    "dynamic": {"rope_type": "dynamic", "factor": 4.0},
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.5,
        "high_freq_factor": 3.0,
        "original_max_position_embeddings": 64,
    },
    "longrope": LONG,
    "longrope with its factor": {**LONG, "attention_factor": 1.25},
    "longrope without a scaling": {**LONG, "factor": 1.0},
    "yarn": YARN,
    "yarn with its factor": {**YARN, "attention_factor": 1.25},
    "yarn without a scaling": {**YARN, "factor": 1.0},
    "yarn with two scales": {**YARN, "mscale": 1.0, "mscale_all_dim": 0.5},
    "yarn without rounding": {**YARN, "beta_fast": 16.0, "beta_slow": 2.0, "truncate": False},
}


@pytest.mark.parametrize("kind", KINDS)
def test_frequencies_are_those_of_transformers(kind):
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    numbers = {"rope_theta": 5000.0, **KINDS[kind]}
    config = LlamaConfig(
        hidden_size=48, num_attention_heads=4, head_dim=12, max_position_embeddings=256, rope_parameters=dict(numbers)
    )
    expected, factor = ROPE_INIT_FUNCTIONS[numbers["rope_type"]](config, "cpu", seq_len=64)
    torch.testing.assert_close(rope.frequencies(numbers, 12), expected, rtol=1e-6, atol=0)
    assert rope.own_factor(numbers) == pytest.approx(factor, rel=1e-12)


@pytest.mark.parametrize("heads", [1, 4, 6, 12, 71, 112])
def test_slopes_are_those_of_bloom_and_mpt(heads):
    from transformers.models.bloom.modeling_bloom import build_alibi_tensor
    from transformers.models.mpt.modeling_mpt import build_mpt_alibi_tensor

    bloom = build_alibi_tensor(torch.ones(1, 5), heads, torch.float32)
    torch.testing.assert_close(scores.slopes(heads), bloom[:, 0, 1])
    mpt = build_mpt_alibi_tensor(heads, 5, alibi_bias_max=6)
    torch.testing.assert_close(scores.slopes(heads, bias_max=6.0), -mpt.reshape(heads, -1)[:, -2])
    assert scores.slopes(heads, scale=0.5).equal(scores.slopes(heads) * 0.5)


def test_xielu_is_that_of_transformers():
    from transformers.activations import XIELUActivation

    theirs = XIELUActivation(dtype=torch.float32)

    class Provider:
        params_dtype = torch.float32

    ours = XIELU(Provider())
    for name in ("alpha_p", "alpha_n"):
        torch.testing.assert_close(getattr(ours, name), getattr(theirs, name))
        getattr(ours, name).data += 0.3
        getattr(theirs, name).data += 0.3
    inputs = torch.randn(4000, generator=torch.Generator().manual_seed(1)) * 3
    actual = _with_gradients(lambda given: xielu(given, ours.alpha_p, ours.alpha_n), inputs, ours)
    torch.testing.assert_close(actual, _with_gradients(theirs._xielu_python, inputs, theirs))


def _with_gradients(function, inputs, module):
    """What comes out, and the gradients of the input and of both weights."""
    given = inputs.clone().requires_grad_()
    answer = function(given)
    return answer, *torch.autograd.grad(answer.sin().sum(), (given, module.alpha_p, module.alpha_n))


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ("silu", "silu"), ("gelu", "gelu"), ("relu", "relu"), ("squared_relu", "relu2"), ("quick_gelu", "quick_gelu"),
        ("fast_gelu", "gelu_new"), ("fast_gelu", "gelu_pytorch_tanh"),
    ],
)  # fmt: skip
def test_activations_are_those_of_transformers(ours, theirs):
    from transformers.activations import ACT2FN

    function, inputs = values.activation(ours), torch.linspace(-6, 6, 1001)
    torch.testing.assert_close(function(inputs), ACT2FN[theirs](inputs), rtol=1e-6, atol=1e-6)
    assert values.plain(function) == ours
