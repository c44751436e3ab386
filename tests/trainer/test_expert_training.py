"""Mixtures of experts are trained as transformers and AdamW train them, however ranks divide them, and with the auxiliary losses
of megatron-core's papers."""

from __future__ import annotations

import functools

import pytest
import torch

from converter import families
from tests.trainer import small, test_parity
from tests.trainer.small import BATCH, MICRO_BATCH, STEPS
from tests.trainer.test_parity import TOLERANCE, rate_of

TP2, PP2 = {"model__tensor_model_parallel_size": 2}, {"model__pipeline_model_parallel_size": 2}
EP2, ETP1 = {"model__expert_model_parallel_size": 2}, {"model__expert_tensor_parallel_size": 1}
ALLGATHER = {"model__moe_token_dispatcher_type": "allgather"}
SHARDED = {"ddp__use_distributed_optimizer": True}
RECOMPUTED = {"model__recompute_granularity": "selective", "model__recompute_modules": ["moe"]}
LAYOUTS = {
    "one": (1, {}),
    "ep2": (2, EP2),
    "ep2 allgather": (2, {**EP2, **ALLGATHER}),
    "ep2 distributed optimizer": (2, {**EP2, **SHARDED}),
    "tp2 ep2": (4, {**TP2, **EP2}),
    "tp2 ep2 etp1": (2, {**TP2, **EP2, **ETP1}),
    "tp2": (2, TP2),
    "etp2": (2, {"model__expert_tensor_parallel_size": 2}),
    "pp2": (2, PP2),
    "pp2 ep2": (4, {**PP2, **EP2}),
    "recomputed": (1, RECOMPUTED),
}
SEQUENCE_PARALLEL = {"tp2 sequence parallel": (2, {**TP2, "model__sequence_parallel": True, **ETP1})}
"""Sparse attention has no TP without it."""

FAMILIES = [name for name in ("mixtral", "qwen3_moe", "deepseek_v3") if name in families.names()]
FAST = {"mixtral": "ep2", "qwen3_moe": "tp2 ep2 etp1", "deepseek_v3": "pp2"}
FEW = 5
CASES = [
    *(pytest.param((family, FAST[family], FEW), id=f"{family}, {FAST[family]}") for family in FAMILIES),
    *(
        pytest.param((family, layout, STEPS), id=f"{family}, {layout}, all steps", marks=pytest.mark.slow)
        for family in FAMILIES
        for layout in LAYOUTS
    ),
    *(
        pytest.param(("deepseek_v32", layout, FEW), id=f"deepseek_v32, {layout}", marks=pytest.mark.slow)
        for layout in ("one", "pp2 ep2", "recomputed", *SEQUENCE_PARALLEL)
    ),
]
_STILL = {"model__moe_router_bias_update_rate": 0.0, "model__mtp_num_layers": None}
STILL = {"deepseek_v3": _STILL, "deepseek_v32": _STILL}
"""What transformers does not do: it leaves biases of routers alone, and layers that predict further tokens out."""


@pytest.fixture(scope="module")
def reference(family_folder):
    """Losses and gradient norms of transformers and AdamW, once for each family."""
    known = {}

    def run(family, steps):
        if (family, steps) not in known:
            known[family, steps] = test_parity._reference(family_folder(family), steps)
        return known[family, steps]

    return run


@pytest.mark.parametrize("case", CASES)
def test_the_curve_is_that_of_transformers_and_adamw(case, ranks, family_folder, reference):
    family, layout, steps = case
    losses, norms = reference(family, steps)
    world, changes = {**LAYOUTS, **SEQUENCE_PARALLEL}[layout]
    for history in ranks.run(
        small.train, world, str(family_folder(family)), {**_first(steps), **changes, **STILL.get(family, {})}
    ):
        assert history.losses == pytest.approx(losses, abs=TOLERANCE)
        assert history.grad_norms[:2] == pytest.approx(
            norms[:2], rel=TOLERANCE
        )  # those after are of weights that rounding parted
    assert min(losses) < losses[0] - 0.1


def _first(steps):
    """The first steps of a run of `STEPS`."""
    return {"train__train_iters": steps, "scheduler__lr_decay_iters": STEPS}


COEFFICIENT = 0.5
"""Large, so that it shows."""


def balancing_losses(logits: torch.Tensor, chosen: int) -> tuple[torch.Tensor, torch.Tensor, float]:
    """Of the tokens of a microbatch in one layer, [tokens, experts]: Switch Transformer's loss, E·Σ fᵢ·Pᵢ; ST-MoE's z-loss; and
    the tokens of the busiest expert over the mean."""
    tokens, experts = logits.shape
    probabilities = torch.softmax(logits.float(), dim=-1)
    picked = torch.zeros_like(probabilities).scatter(1, probabilities.topk(chosen, dim=-1).indices, 1.0)
    balance = experts * (picked.sum(0) / (tokens * chosen) * probabilities.mean(0)).sum()
    return balance, torch.logsumexp(logits.float(), dim=-1).square().mean(), picked.sum(0)


def _with_auxiliary_losses(folder, steps, *, z=0.0):
    """transformers' model with the auxiliary losses of each layer added up, of each microbatch as megatron-core does."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    groups = [
        {"params": [p for p in model.parameters() if p.ndim > 1], "weight_decay": 0.1},
        {"params": [p for p in model.parameters() if p.ndim == 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), eps=1e-8)
    samples = small.FixedTokens(model.config.vocab_size).build(None, 0, (10**6, 0, 0))[0]
    measured = []
    for step in range(steps):
        optimizer.zero_grad()
        seen = [_microbatch(model, samples, step * BATCH + first, z) for first in range(0, BATCH, MICRO_BATCH)]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = rate_of(step, steps=STEPS)
        optimizer.step()
        loss, balance, squares = (sum(values) / len(values) for values in list(zip(*seen, strict=True))[:3])
        loads = torch.stack(list(zip(*seen, strict=True))[3]).sum(0)
        measured.append((loss, balance, squares, (loads.amax(1) / loads.mean(1)).mean().item()))
    return tuple(zip(*measured, strict=True))


def _microbatch(model, samples, first, z):
    """Add the gradients of a microbatch. Its loss, the auxiliary losses as means over layers, and tokens per expert."""
    batch = [samples[first + number] for number in range(MICRO_BATCH)]
    tokens, labels = (torch.stack([sample[name] for sample in batch]) for name in ("tokens", "labels"))
    output = model(tokens, output_router_logits=True)
    loss = torch.nn.functional.cross_entropy(output.logits.flatten(0, 1), labels.flatten())
    layers = [balancing_losses(logits, model.config.num_experts_per_tok) for logits in output.router_logits]
    balance, squares = (sum(values) for values in list(zip(*layers, strict=True))[:2])
    ((loss + COEFFICIENT * balance + z * squares) * MICRO_BATCH / BATCH).backward()
    count = len(layers)
    return loss.item(), balance.item() / count, squares.item() / count, torch.stack([layer[2] for layer in layers])


AUXILIARY = {"model__moe_aux_loss_coeff": COEFFICIENT, "model__moe_z_loss_coeff": 0.01}


@pytest.fixture(scope="module")
def balanced(family_folder):
    """The same of transformers with auxiliary losses, for a number of steps."""
    return functools.cache(lambda steps: _with_auxiliary_losses(family_folder("mixtral"), steps, z=0.01))


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(("tp2 ep2 etp1", FEW), id="tp2 ep2 etp1"),
        *(pytest.param((layout, STEPS), id=f"{layout}, all steps", marks=pytest.mark.slow) for layout in LAYOUTS),
    ],
)
def test_auxiliary_losses_are_those_of_their_formulas_and_are_logged(case, ranks, family_folder, balanced, reference):
    layout, steps = case
    losses, balance, squares, loads = balanced(steps)
    world, changes = LAYOUTS[layout]
    for history in ranks.run(small.train, world, str(family_folder("mixtral")), {**_first(steps), **changes, **AUXILIARY}):
        assert history.losses == pytest.approx(losses, abs=TOLERANCE)
        logged = {name: [step[name] for step in history.layers] for name in history.layers[0]}
        assert logged["load_balancing_loss"] == pytest.approx(balance, abs=TOLERANCE)
        assert logged["z_loss"] == pytest.approx(squares, rel=TOLERANCE)
        assert logged["max_expert_load"] == pytest.approx(loads, rel=1e-6)
    without, _ = reference("mixtral", steps)
    assert max(abs(loss - plain) for loss, plain in zip(losses, without, strict=True)) > 10 * TOLERANCE


def test_transformers_own_loss_is_of_all_layers_at_once_and_not_divided_by_the_experts_per_token(family_folder):
    from transformers import AutoModelForCausalLM

    for layers in (1, 3):
        path = family_folder("mixtral", num_hidden_layers=layers, output_router_logits=True, router_aux_loss_coef=COEFFICIENT)
        model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
        tokens = torch.stack([small.FixedTokens(384).build(None, 0, (9, 0, 0))[0][number]["tokens"] for number in range(4)])
        with torch.no_grad():
            output = model(tokens, labels=tokens)
        each = [balancing_losses(logits, 2)[0] for logits in output.router_logits]
        joined = balancing_losses(torch.cat(output.router_logits), 2)[0]
        assert output.aux_loss.item() == pytest.approx(2 * joined.item(), rel=1e-5)
        assert (joined.item() == pytest.approx(sum(each).item(), rel=1e-5)) == (layers == 1)
