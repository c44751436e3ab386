"""Generated text is transformers': token for token without sampling, by the same distributions with it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from formats.errors import UserError
from tests.trainer import small

NEW = 24
PROMPTS = ["Tiny real models", "a tokenizer trained on the spot, saved as people save them", "from"]
LAYOUTS = {
    "tp1": (1, ()),
    "tp2": (2, ("model.tensor_model_parallel_size=2",)),
    "pp2": (2, ("model.pipeline_model_parallel_size=2",)),
    "vpp2": (2, ("model.pipeline_model_parallel_size=2", "model.virtual_pipeline_model_parallel_size=2")),
    "tp2_pp2": (4, ("model.tensor_model_parallel_size=2", "model.pipeline_model_parallel_size=2")),
}


def answers(source: str, told: tuple[str, ...] = (), prompts: list[str] = PROMPTS, **sampling: Any) -> Any:
    """On this rank of an open world: what is generated, where this is the rank that speaks; the error's text, if any."""
    from trainer import parallel
    from trainer.generation import Sampling, checkpoint

    found = []
    try:
        settings = checkpoint.make_run(source, ("dist.device=cpu", *told), world_size=parallel.world_size())
        checkpoint.run(
            source,
            lambda: prompts,
            settings=settings,
            max_new_tokens=NEW,
            sampling=Sampling(**sampling),
            tell=None,
            done=lambda answers, _: found.extend(answers),
        )
    except UserError as error:
        return str(error)
    return found


def sampled(source: str, told: tuple[str, ...], sampling: dict[str, Any]) -> Any:
    return answers(source, told, **sampling)


def transformers_tokens(folder: Path, prompts: list[str] = PROMPTS) -> list[list[int]]:
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"))
    found = []
    for prompt in prompts:
        asked = tokenizer(prompt, return_tensors="pt")["input_ids"]
        tokens = model.generate(asked, attention_mask=torch.ones_like(asked), do_sample=False, max_new_tokens=NEW, pad_token_id=0)
        found.append(tokens[0, asked.shape[1] :].tolist())
    return found


@pytest.mark.parametrize("variant", ["gqa", "tied", "padded_vocab", "rope31"])
def test_without_sampling_the_tokens_are_those_of_transformers(variant, ranks, model_folder):
    folder = model_folder(variant)
    expected = transformers_tokens(folder)
    for world, told in LAYOUTS.values():
        found = ranks.run(answers, world, str(folder), told)[-1]
        assert [one.tokens for one in found] == expected
        assert [one.prompt for one in found] == PROMPTS
        assert not any(one.finished for one in found)
