"""What is trained of each kind of family is what transformers, PEFT and torch's AdamW train: losses, adapters, generated text."""

from __future__ import annotations

import json

import pytest
import torch

from converter import adapter_to_hf, families, mcore_to_hf
from tests import models
from tests.converter.family_suite import small_model
from tests.trainer import small, test_parity
from tests.trainer.small import BATCH, STEPS
from tests.trainer.test_generation import NEW, answers, tokens, transformers_tokens

TRAINED = ("qwen2", "qwen3", "gemma2", "gemma3_text", "phi3", "olmo2", "glm4", "granite", "gpt_neox", "cohere",
           "minicpm3", "olmo")  # fmt: skip
"""One of each kind: own layers, norms after branches, parallel branches, multipliers, caps, two ropes, fused projections, latent
attention, weights that Hugging Face lacks."""

FEW, END = 5, 2
TP2 = {"model__tensor_model_parallel_size": 2}
PP2 = {"model__pipeline_model_parallel_size": 2}
SHORT = {"train__train_iters": FEW, "scheduler__lr_decay_iters": STEPS}
STEEP = {"gemma3_text": 0.1}
"""A share of the learning rate for models whose gradients are 40 long: at the whole rate, transformers' own fifth loss in fp32 is
2.5e-4 from that in fp64, so that rounding would be compared."""


@pytest.fixture(scope="module", params=[family for family in TRAINED if family in families.names()])
def folder(request, tmp_path_factory):
    """A small model of a family in fp32, with a tokenizer."""
    return saved(small_model(request.param, dtype="float32"), tmp_path_factory.mktemp(request.param) / "hf")


def steps_are_those_of_transformers(folder, ranks, changes):
    """Train a few steps over two tensor-parallel ranks and over two stages, and compare losses and gradient norms."""
    share = STEEP.get(json.loads((folder / "config.json").read_text())["model_type"], 1.0)
    losses, norms = test_parity._reference(folder, FEW, share=share)
    rates = {"optimizer__lr": share * small.LR, "optimizer__min_lr": share * small.MIN_LR}
    for layout in (TP2, PP2):
        for history in ranks.run(small.train, 2, str(folder), {**changes, **rates, **layout}):
            assert history.losses == pytest.approx(losses, abs=test_parity.TOLERANCE)
            assert history.grad_norms[:2] == pytest.approx(norms[:2], rel=1e-4)  # those after are of weights that rounding parted
    assert len(set(losses)) == FEW


def saved(model, folder):
    """Save a small model with a tokenizer, whose last token ends what is generated."""
    model.config.eos_token_id = model.generation_config.eos_token_id = END
    return models.save(model, folder)


def test_a_few_steps_are_those_of_transformers_and_adamw(folder, ranks):
    steps_are_those_of_transformers(folder, ranks, SHORT)


def test_adapters_that_are_exported_are_in_peft_what_they_are_here(folder, ranks, tmp_path):
    from trainer.peft import LoRA

    latent = "kv_lora_rank" in (folder / "config.json").read_text()
    targets = {"target_modules": ["linear_proj", "linear_fc1", "linear_fc2"]} if latent else {}
    changes = {**SHORT, **TP2, "peft": LoRA(dim=4, alpha=8, **targets)}
    whole, *_ = ranks.run(small.train, 2, str(folder), changes)
    ranks.run(
        small.train, 2, str(folder), {**changes, "checkpoint__save": str(tmp_path / "run"), "train__exit_interval": FEW - 1}
    )
    adapter_to_hf(tmp_path / "run", tmp_path / "adapter")
    assert loss_in_peft(folder, tmp_path / "adapter", FEW - 1) == pytest.approx(whole.losses[-1], abs=test_parity.TOLERANCE)
    assert whole.losses[-1] != whole.losses[0]


def loss_in_peft(folder, adapter, step):
    """The loss of a step's batch; without an adapter that of the base."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    model = PeftModel.from_pretrained(model, str(adapter)).eval() if adapter else model
    samples = small.FixedTokens(model.config.vocab_size).build(None, 0, (10**6, 0, 0))[0]
    batch = [samples[step * BATCH + number] for number in range(BATCH)]
    tokens, labels = (torch.stack([sample[name] for sample in batch]) for name in ("tokens", "labels"))
    with torch.no_grad():
        return torch.nn.functional.cross_entropy(model(tokens).logits.flatten(0, 1), labels.flatten()).item()


def test_generated_tokens_are_those_of_transformers(folder, ranks):
    theirs = transformers_tokens(folder)
    for world, layout, number in ((1, (), NEW), (2, ("model.tensor_model_parallel_size=2",), FEW)):
        expected = [[token for token in row[:number] if token != END] for row in theirs]
        assert tokens(ranks.run(answers, world, str(folder), layout, {"max_new_tokens": number})[-1]) == expected


def test_what_a_run_saves_is_exported_as_the_model_that_it_began_with(folder, ranks, tmp_path):
    still = {"train__train_iters": 1, "optimizer__lr": 0.0, "optimizer__min_lr": 0.0, "checkpoint__save": str(tmp_path / "run")}
    ranks.run(small.train, 2, str(folder), {**still, "scheduler__lr_warmup_iters": 0, **TP2})
    mcore_to_hf(tmp_path / "run", tmp_path / "back")
    assert models.model_tree(tmp_path / "back") == models.model_tree(folder)
