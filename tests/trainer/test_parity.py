"""Training here is training: transformers with torch's AdamW, on the same samples in the same order, gives the same curve."""

from __future__ import annotations

import math

import pytest
import torch

from tests.trainer import small
from tests.trainer.small import BATCH, STEPS

LAYOUTS = {
    "tp1": (1, {}),
    "tp2": (2, {"model__tensor_model_parallel_size": 2}),
    "pp2": (2, {"model__pipeline_model_parallel_size": 2}),
    "vpp2": (2, {"model__pipeline_model_parallel_size": 2, "model__virtual_pipeline_model_parallel_size": 2}),
    "dp2": (2, {}),
    "dp2_distributed": (2, {"ddp__use_distributed_optimizer": True}),
    "tp2_pp2": (4, {"model__tensor_model_parallel_size": 2, "model__pipeline_model_parallel_size": 2}),
}
CASES = [
    *((layout, "gqa") for layout in LAYOUTS),
    ("tp1", "padded_vocab"),
    ("tp2", "padded_vocab"),
    ("tp2_pp2", "padded_vocab"),
    ("tp2", "tied"),
    ("pp2", "tied"),
    ("tp2_pp2", "tied"),
    ("tp1", "rope31"),
    ("tp1", "rope_other_numbers"),
    ("tp2", "both_biases"),
    ("tp2", "head_dim"),
]
TOLERANCE = 1e-4
"""fp32 sums in another order, carried through 20 updates."""


@pytest.fixture(scope="module")
def reference(model_folder):
    """Losses and gradient norms of transformers and AdamW, once for each model."""
    known: dict[str, tuple[list[float], list[float]]] = {}

    def run(variant: str) -> tuple[list[float], list[float]]:
        if variant not in known:
            known[variant] = _reference(model_folder(variant))
        return known[variant]

    return run


def _reference(folder, steps=STEPS, *, share=1.0):
    """Losses and gradient norms of transformers and AdamW, at a share of the learning rate."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    decayed = [p for name, p in model.named_parameters() if p.ndim > 1]
    plain = [p for name, p in model.named_parameters() if p.ndim == 1]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": plain, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), eps=1e-8)
    samples = small.FixedTokens(model.config.vocab_size).build(None, 0, (10**6, 0, 0))[0]
    losses, norms = [], []
    for step in range(steps):
        batch = [samples[step * BATCH + i] for i in range(BATCH)]
        tokens, labels = (torch.stack([sample[name] for sample in batch]) for name in ("tokens", "labels"))
        loss = torch.nn.functional.cross_entropy(model(tokens).logits.flatten(0, 1), labels.flatten())
        optimizer.zero_grad()
        loss.backward()
        norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0).item())
        for group in optimizer.param_groups:
            group["lr"] = share * rate_of(step, steps=STEPS)
        optimizer.step()
        losses.append(loss.item())
    return losses, norms


def rate_of(step: int, *, steps: int) -> float:
    """Linear warm-up over 4 steps from 0, then a cosine to a tenth: Megatron's schedule, by its definition."""
    if step <= 4:
        return small.LR * step / 4
    return small.MIN_LR + 0.5 * (small.LR - small.MIN_LR) * (1 + math.cos(math.pi * (step - 4) / (steps - 4)))


@pytest.mark.parametrize(("layout", "variant"), CASES)
def test_the_curve_is_that_of_transformers_and_adamw(layout, variant, ranks, model_folder, reference):
    world, changes = LAYOUTS[layout]
    losses, norms = reference(variant)
    for history in ranks.run(small.train, world, str(model_folder(variant)), changes):
        assert history.rates == pytest.approx([rate_of(step, steps=STEPS) for step in range(STEPS)], rel=1e-9)
        assert history.losses == pytest.approx(losses, abs=TOLERANCE)
        assert history.grad_norms == pytest.approx(norms, rel=TOLERANCE, abs=TOLERANCE)
    assert losses[-1] < losses[0] - 0.5
    assert max(norms) > 1.0  # clipping took part


def test_gradients_accumulate_over_microbatches(ranks, model_folder, reference):
    losses, norms = reference("gqa")
    for micro in (1, 4):
        (history,) = ranks.run(small.train, 1, str(model_folder("gqa")), {"train__micro_batch_size": micro})
        assert history.losses == pytest.approx(losses, abs=TOLERANCE)
        assert history.grad_norms == pytest.approx(norms, rel=TOLERANCE, abs=TOLERANCE)
