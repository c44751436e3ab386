"""Gated delta nets: torch's kernels compute what transformers' do, training is the same however layers are computed, and what has
no state to keep is refused."""

from __future__ import annotations

import pytest
import torch
from transformers.models.qwen3_5 import modeling_qwen3_5 as theirs

from formats.errors import UserError
from tests import models
from tests.converter.family_suite import small_model
from tests.trainer import small, test_parity
from tests.trainer.settings import settings
from tests.trainer.test_family_training import END, FEW, PP2, SHORT, TP2
from tests.trainer.test_generation import answers
from trainer import torch_kernels
from trainer.config import FinetuningDatasetConfig
from trainer.settings.resolve import resolve


def test_kernels_are_those_of_transformers_with_their_gradients():
    torch.manual_seed(0)
    states, weight, bias = (torch.randn(shape, requires_grad=True) for shape in ((2, 9, 6), (6, 4), (6,)))
    for given, activation in ((bias, "silu"), (None, None)):
        mine, kept = torch_kernels.causal_conv1d(states, weight, bias=given, activation=activation)
        other = theirs.causal_conv1d_fn(states.transpose(1, 2), weight, given, activation).transpose(1, 2)
        torch.testing.assert_close(mine, other)
        for gradient, expected in zip(
            *(torch.autograd.grad(output.square().sum(), (states, weight)) for output in (mine, other)), strict=True
        ):
            torch.testing.assert_close(gradient, expected)
        assert kept is None
    torch.testing.assert_close(torch_kernels.l2norm(states), theirs.l2norm(states))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    model = small_model("qwen3_5_text", dtype="float32")
    model.config.eos_token_id = model.generation_config.eos_token_id = END
    return models.save(model, tmp_path_factory.mktemp("net") / "hf")


FULL = {"model__recompute_granularity": "full", "model__recompute_method": "uniform", "model__recompute_num_layers": 1}
LAYOUTS = {
    "tp2, sequence parallel, all computed again": {**TP2, "model__sequence_parallel": True, **FULL},
    "tp2": TP2,
    "pp2, all computed again": {**PP2, **FULL},
    "deterministic": {"model__deterministic_mode": True},
}
QUICK = ("tp2, sequence parallel, all computed again",)


@pytest.mark.parametrize("name", [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in LAYOUTS])
def test_a_few_steps_are_those_of_transformers_and_adamw_in_every_layout(folder, ranks, name):
    losses, norms = test_parity._reference(folder, FEW)
    for history in ranks.run(small.train, 1 if name == "deterministic" else 2, str(folder), {**SHORT, **LAYOUTS[name]}):
        assert history.losses == pytest.approx(losses, abs=test_parity.TOLERANCE)
        assert history.grad_norms[:2] == pytest.approx(norms[:2], rel=1e-4)
    assert len(set(losses)) == FEW


def test_the_layers_of_a_delta_net_are_trained_on_every_rank_alike(folder, ranks):
    """Ranks have the norm of all heads, and each the gradient of its own."""
    first, second = ranks.run(small.train, 2, str(folder), {**SHORT, **TP2})
    norms = [name for name in first.weights if name.endswith("out_norm.weight")]
    assert len(norms) == 3
    for name in norms:
        assert torch.equal(first.weights[name], second.weights[name])


NET = {"model__experimental_attention_variant": "gated_delta_net", "model__linear_attention_freq": 2}


@pytest.mark.parametrize(("device", "more"), [("cpu", {}), ("gpu", {"model__deterministic_mode": True})])
def test_packed_examples_are_refused_where_the_state_would_go_on(device, more):
    packed = {"dataset": FinetuningDatasetConfig(sequence_length=64)}
    with pytest.raises(UserError, match=r"`gated_delta_net`, whose .* take one packed example for the start of the next"):
        resolve(settings(**NET, **more, **packed), world_size=1, device=device)


def test_no_text_is_generated(folder, ranks):
    (answer,) = ranks.run(answers, 1, str(folder), ())
    assert "is `gated_delta_net`, with which no text can be generated" in answer
