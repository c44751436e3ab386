"""FLOPs per token against PyTorch's own counter on transformers' models."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from formats.errors import UserError
from tests import models
from tests.trainer.settings import LLAMA
from trainer.counting.flops import flops_per_token
from trainer.model import GPTModelProvider, from_hf_config


def counted(model: Any, length: int, *, batch: int = 1) -> float:
    """Forward and backward of one batch. Eager attention multiplies the whole square: the causal half of it is counted."""
    tokens = torch.arange(batch * length).reshape(batch, length) % 97
    with FlopCounterMode(display=False) as counter:
        model(tokens, labels=tokens, use_cache=False).loss.backward()
    operations = counter.get_flop_counts()["Global"]
    square = operations.pop(torch.ops.aten.bmm)
    return sum(operations.values()) + square / 2


@pytest.mark.parametrize("variant", ["gqa", "mha", "head_dim", "tied", "padded_vocab"])
def test_a_llama_multiplies_as_often_as_counted(variant: str) -> None:
    model = models.build(variant)
    model.set_attn_implementation("eager")
    provider = from_hf_config({**LLAMA, **models.VARIANTS[variant]})
    for length, batch in ((32, 2), (48, 1)):
        assert flops_per_token(provider, length) * length * batch == counted(model, length, batch=batch)


def test_other_sizes_too() -> None:
    changes = {"hidden_size": 96, "intermediate_size": 160, "num_hidden_layers": 3, "num_attention_heads": 6,
               "num_key_value_heads": 2, "vocab_size": 200}  # fmt: skip
    model = models.build(**changes)
    model.set_attn_implementation("eager")
    assert flops_per_token(from_hf_config({**LLAMA, **changes}), 40) * 40 == counted(model, 40)


def test_packed_sequences_attend_only_to_themselves() -> None:
    model = models.build()
    model.set_attn_implementation("eager")
    packed = flops_per_token(from_hf_config(LLAMA), 48, lengths=[16, 32])
    assert packed * 48 == counted(model, 16) + counted(model, 32)


def mixtral(**changes: Any) -> Any:
    from transformers import MixtralConfig, MixtralForCausalLM

    sizes = {**models.BASE, "num_local_experts": 4, "num_experts_per_tok": 2, **changes}
    return MixtralForCausalLM(MixtralConfig(**sizes, experts_implementation="eager", attn_implementation="eager"))


def experts_provider(**changes: Any) -> GPTModelProvider:
    provider = from_hf_config(LLAMA)
    for name, value in {"num_moe_experts": 4, "moe_router_topk": 2, **changes}.items():
        setattr(provider, name, value)
    return provider


def test_experts_count_for_the_tokens_they_get() -> None:
    assert flops_per_token(experts_provider(), 32) * 32 == counted(mixtral(), 32)


def test_a_window_leaves_out_what_lies_beyond_it() -> None:
    provider, plain = from_hf_config(LLAMA), from_hf_config(LLAMA)
    provider.window_size = (15, 0)
    seen = torch.ones(64, 64).tril().triu(-15)
    # The diagonal, which a continuous half square cuts in two, counts as half on both sides.
    share = (seen.sum() - 8) / (torch.ones(64, 64).tril().sum() - 32)
    matrices = flops_per_token(plain, 64, lengths=[1] * 64) - 6 * 4 * 64
    attention = flops_per_token(plain, 64) - matrices
    assert flops_per_token(provider, 64) == pytest.approx(matrices + attention * share.item(), rel=1e-6)  # one float32 division


def test_a_model_of_another_kind_is_refused() -> None:
    provider = from_hf_config(LLAMA)
    provider.multi_latent_attention = True
    with pytest.raises(UserError) as caught:
        flops_per_token(provider, 64)
    assert str(caught.value) == (
        "no formula for the size of a model with `multi_latent_attention`: `True`\n\n"
        "hint: only models with plain attention and feed-forward layers or experts are counted"
    )
