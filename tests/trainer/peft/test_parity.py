"""Adapters here are PEFT's: from the same first values they give the same curve. And what PEFT has not is torch's."""

from __future__ import annotations

import math

import pytest
import torch

from tests.trainer.peft.runs import ALPHA, DIM, LAYOUTS, ONE_STEP, by_peft, run, trained_by_torch

CLOSE = 1e-4
"""fp32 sums in another order, carried through 20 updates."""
CASES = {
    "lora": ("LoRA", {}, {}),
    "dora": ("DoRA", {}, {"use_dora": True}),
    "rslora": ("LoRA", {"use_rslora": True}, {"use_rslora": True}),
}


@pytest.fixture(scope="module")
def reference(model_folder):
    """First values, losses and gradient norms of PEFT, once for each way."""
    known = {}

    def find(variant, case, *, zero_b=True):
        key = (variant, case, zero_b)
        if key not in known:
            model, begin = by_peft(model_folder(variant), seed=7, zero_b=zero_b, **CASES[case][2])
            known[key] = (begin, *trained_by_torch(model))
        return known[key]

    return find


@pytest.mark.parametrize(
    ("layout", "case", "zero_b"),
    [
        *((layout, case, True) for layout in LAYOUTS for case in ("lora", "dora")),
        *(("tp2", case, False) for case in ("lora", "dora")),
        ("tp1", "rslora", False),
    ],
)
def test_the_curve_is_that_of_peft(layout, case, *, zero_b, ranks, model_folder, reference):
    world, changes = LAYOUTS[layout]
    kind, settings, _ = CASES[case]
    begin, losses, norms = reference("gqa", case, zero_b=zero_b)
    for result in ranks.run(run, world, str(model_folder("gqa")), changes, kind, settings | {"canonical": True}, begin):
        assert result["losses"] == pytest.approx(losses, abs=CLOSE)
        assert result["grad_norms"] == pytest.approx(norms, rel=CLOSE, abs=CLOSE)
    assert losses[-1] < losses[0] - 0.05


@pytest.mark.parametrize("layout", ["tp1", "tp2"])
def test_dora_leaves_biases_alone_as_peft_does(layout, ranks, model_folder, reference):
    world, changes = LAYOUTS[layout]
    begin, losses, norms = reference("both_biases", "dora", zero_b=False)
    folder = str(model_folder("both_biases"))
    for result in ranks.run(run, world, folder, changes, "DoRA", {"canonical": True}, begin):
        assert result["losses"] == pytest.approx(losses, abs=CLOSE)
        assert result["grad_norms"] == pytest.approx(norms, rel=CLOSE, abs=CLOSE)


def test_lora_plus_is_adamw_with_two_learning_rates(ranks, model_folder):
    model, begin = by_peft(model_folder("gqa"), seed=7)
    losses, norms = trained_by_torch(model, b_rate=4.0)
    settings = {"canonical": True, "lora_plus_ratio": 4.0}
    (result,) = ranks.run(run, 1, str(model_folder("gqa")), {}, "LoRA", settings, begin)
    assert result["losses"] == pytest.approx(losses, abs=CLOSE)
    assert result["grad_norms"] == pytest.approx(norms, rel=CLOSE)


class _SharedA(torch.nn.Module):
    """What one A for several layers is, written down: the layer, and its rows of B."""

    def __init__(self, layer, a, b):
        super().__init__()
        self.layer, self.a, self.lora_B = layer, a, torch.nn.Parameter(b)

    def forward(self, x):
        return self.layer(x) + ALPHA / DIM * (x @ self.a.T) @ self.lora_B.T


def _by_torch(folder, begin):
    """transformers' model with the fused adapters of `begin`."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).requires_grad_(requires_grad=False)
    heads, groups = model.config.num_attention_heads, model.config.num_key_value_heads
    for number, layer in enumerate(model.model.layers):
        a, b = _pair(begin, number, "self_attention.linear_qkv")
        by_group = b.view(groups, heads // groups + 2, -1, DIM)
        attention, mlp = layer.self_attn, layer.mlp
        for name, rows in {"q_proj": by_group[:, :-2], "k_proj": by_group[:, -2], "v_proj": by_group[:, -1]}.items():
            setattr(attention, name, _SharedA(getattr(attention, name), a, rows.reshape(-1, DIM).clone()))
        attention.o_proj = _SharedA(attention.o_proj, *_pair(begin, number, "self_attention.linear_proj"))
        a, b = _pair(begin, number, "mlp.linear_fc1")
        for name, rows in zip(("gate_proj", "up_proj"), b.chunk(2), strict=True):
            setattr(mlp, name, _SharedA(getattr(mlp, name), a, rows.clone()))
        mlp.down_proj = _SharedA(mlp.down_proj, *_pair(begin, number, "mlp.linear_fc2"))
    return model


def _pair(begin, layer, module):
    a, b = (begin[f"decoder.layers.{layer}.{module}.adapter.linear_{end}.weight"] for end in ("in", "out"))
    return torch.nn.Parameter(a.clone()), b.clone()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_one_a_for_a_fused_layer_is_that_of_torch(layout, ranks, model_folder):
    folder = str(model_folder("gqa"))
    (first,) = ranks.run(run, 1, folder, ONE_STEP, "LoRA", {})
    made = torch.Generator().manual_seed(3)
    begin = {name: torch.randn(weight.shape, generator=made) * 0.05 for name, weight in first["weights"].items()}
    losses, norms = trained_by_torch(_by_torch(folder, begin))
    world, changes = LAYOUTS[layout]
    for result in ranks.run(run, world, folder, changes, "LoRA", {}, begin):
        assert result["losses"] == pytest.approx(losses, abs=CLOSE)
        assert result["grad_norms"] == pytest.approx(norms, rel=CLOSE, abs=CLOSE)


def test_the_first_values_are_those_of_peft(ranks, model_folder):
    """Uniform in ±1/√inputs, and zero."""
    (result,) = ranks.run(run, 1, str(model_folder("gqa")), ONE_STEP, "LoRA", {})  # lr 0 in its one step
    _, begin = by_peft(model_folder("gqa"), seed=7)
    for name, weight in result["weights"].items():
        if name.endswith("linear_in.weight"):
            limit = 1 / math.sqrt(weight.shape[1])
            assert 0.9 * limit < weight.abs().max() <= limit
    theirs = begin["decoder.layers.0.mlp.linear_fc2.adapter.linear_in.weight"]
    assert theirs.abs().max() <= 1 / math.sqrt(theirs.shape[1])
    assert all(weight.count_nonzero() == 0 for name, weight in result["weights"].items() if "linear_out" in name)
