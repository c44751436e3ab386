"""FLOPs per token against PyTorch's own counter on transformers' models."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from formats.errors import UserError
from tests import models
from tests.converter.family_suite import small_config, small_model
from tests.trainer.settings import LLAMA, settings
from trainer.config import RunConfig
from trainer.estimate.flops import flops_of_packed, flops_of_run, flops_per_token
from trainer.model import GPTModelProvider, from_hf_config
from trainer.peft import PEFT, DoRA, LoRA


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


PROJECTIONS = {
    "linear_qkv": ["q_proj", "k_proj", "v_proj"],
    "linear_proj": ["o_proj"],
    "linear_fc1": ["gate_proj", "up_proj"],
    "linear_fc2": ["down_proj"],
}
"""PEFT's names of what adapters stand beside."""


def adapted(targets: list[str], *, layers: list[int] | None = None) -> Any:
    """A Llama whose weights are frozen beside PEFT's adapters of rank 4."""
    from peft import LoraConfig, get_peft_model

    model = models.build()
    model.set_attn_implementation("eager")
    names = [name for target in targets for name in PROJECTIONS[target]]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated")  # PEFT asks transformers 5 for it
        return get_peft_model(model, LoraConfig(r=4, target_modules=names, layers_to_transform=layers))


def without_gradient(length: int, *, adapters: bool = True) -> int:
    """Operations on `length` tokens that we count and nobody does: of the first trained layer's query, key and value the input
    needs no gradient. 2 × their weights, 64 by 64 + 32 + 32, and 2 × their A, 4 by 64 each."""
    return 2 * length * (64 * 128 + (3 * 4 * 64 if adapters else 0))


@pytest.mark.parametrize("targets", [list(PROJECTIONS), ["linear_qkv", "linear_fc2"]])
def test_adapters_beside_frozen_weights_multiply_as_often_as_counted(targets: list[str]) -> None:
    config = settings(peft=LoRA(dim=4, canonical=True, target_modules=targets), dataset__sequence_length=48)
    assert flops_of_run(config) * 48 == counted(adapted(targets), 48) + without_gradient(48)
    packed = flops_of_packed(config.model, 48, 16**2 + 32**2, peft=config.peft)
    apart = sum(counted(adapted(targets), length) + without_gradient(length) for length in (16, 32))
    assert packed == pytest.approx(apart, rel=1e-12)


def test_layers_below_the_first_adapter_only_go_forward() -> None:
    peft = LoRA(dim=4, canonical=True, target_modules=["*.layers.2.*linear_*", "*.layers.3.*linear_*"])
    model = adapted(list(PROJECTIONS), layers=[2, 3])
    assert flops_per_token(from_hf_config(LLAMA), 32, peft=peft) * 32 == counted(model, 32) + without_gradient(32)


def test_a_magnitude_multiplies_no_matrix_and_a_method_of_ones_own_is_not_counted() -> None:
    provider = from_hf_config(LLAMA)
    lora, dora = (flops_per_token(provider, 32, peft=method(dim=4)) for method in (LoRA, DoRA))
    assert lora == dora
    matrices = 4 * 4 * ((64 + 128) + (64 + 64) + (64 + 2 * 96) + (96 + 64))  # layers × r × (inputs + outputs)
    assert flops_per_token(provider, 32, peft=PEFT()) == lora - 6 * matrices


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


@pytest.mark.parametrize("family", ["youtu", "deepseek_v2", "deepseek_v3", "glm4_moe_lite"])
def test_latent_attention_multiplies_as_often_as_counted(family: str) -> None:
    model = small_model(family, dtype="float32", experts_implementation="eager")
    assert flops_per_token(from_hf_config(model.config.to_dict()), 32) * 32 == counted(model, 32)


def _counted_in_megatron(config: dict[str, Any], length: int) -> dict[str, int]:
    """Operations of the model that `mbtrain` builds, on one rank, by torch's kernels: forward and backward."""
    from trainer import model as models
    from trainer import parallel
    from trainer.settings.resolve import resolve

    run = RunConfig(model=from_hf_config(config), mixed_precision="fp32")
    run.optimizer.lr, run.dataset.sequence_length = 1e-4, length
    resolved = resolve(run, world_size=1, device="cpu").config
    with parallel.session(resolved, "cpu"):
        (model,) = models.build(resolved.model)
        return _operations(model.train(), length)


def _operations(model: Any, length: int) -> dict[str, int]:
    tokens = torch.arange(length)[None] % 97
    mask = torch.ones(length, length, dtype=torch.bool).triu(1)[None, None]
    with FlopCounterMode(display=False) as counter:
        model(tokens, torch.arange(length)[None], mask, labels=tokens).sum().backward()
    return {str(kind): count for kind, count in counter.get_flop_counts()["Global"].items()}


BATCHED = ("aten.bmm", "aten.baddbmm")
"""Kernels of attention and of states; megatron-core's attention multiplies whole squares, of which the causal half is counted."""


@pytest.mark.parametrize("predictions", [0, 1, 2])
def test_predictions_of_further_tokens_multiply_as_often_as_counted(predictions: int, ranks: Any) -> None:
    config = small_config("deepseek_v3", num_nextn_predict_layers=predictions).to_dict() | {"vocab_size": 384}
    (operations,) = ranks.run(_counted_in_megatron, 1, config, 32)
    square = sum(operations.pop(kind, 0) for kind in BATCHED)
    assert flops_per_token(from_hf_config(config), 32) * 32 == sum(operations.values()) + square / 2


MAMBA_SMALL = 7 * 8 * 16 * 16
"""Operations per token of the states of a small Mamba layer: 8 heads of 16 channels, with 16 states."""

WITH_STATES = {
    "mamba2": 4 * MAMBA_SMALL,
    "nemotron_h": MAMBA_SMALL + 8 * 2 * 24 * 32,  # and one layer of 8 heads that see 16 of 32 tokens: 2 products of 24 channels
    "qwen3_5_text": 3 * 8 * 4 * 24 * 16 + 8 * 2 * 16 * 32,
    "qwen3_next": 3 * 8 * 4 * 24 * 16 + 8 * 2 * 16 * 32,
}
"""Forward operations per token, among 32, that have no weights."""


@pytest.mark.parametrize("family", WITH_STATES)
def test_layers_with_states_multiply_their_weights_as_often_as_counted(family: str, ranks: Any) -> None:
    """Torch counts what a backward pass does with a convolution of each channel apart as if channels were mixed."""
    config = small_config(family).to_dict() | {"vocab_size": 384}
    (operations,) = ranks.run(_counted_in_megatron, 1, config, 32)
    convolution = operations.pop("aten.convolution")
    operations.pop("aten.convolution_backward")
    of_weights = sum(count for kind, count in operations.items() if kind not in BATCHED) + 3 * convolution
    assert flops_per_token(from_hf_config(config), 32) * 32 == of_weights + 3 * 32 * WITH_STATES[family]


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
    provider.experimental_attention_variant = "mine"
    with pytest.raises(UserError) as caught:
        flops_per_token(provider, 64)
    assert str(caught.value) == (
        "no formula for the size of a model with `experimental_attention_variant`: `mine`\n\n"
        "hint: only models of attention, Mamba-2, gated delta nets, feed-forward layers and experts are counted"
    )


@pytest.mark.parametrize("family", ["deepseek_v32", "glm_moe_dsa"])
def test_sparse_attention_multiplies_its_weights_as_often_as_counted(family: str, ranks: Any) -> None:
    """Its indexer has no loss here and goes forward alone. Scores are counted of the tokens that are chosen, and of all tokens by
    the indexer: kernels on a CPU compute more of them. `linear_kv_up_proj` is multiplied with queries and outputs, in batches."""
    config = small_config(family).to_dict() | {"vocab_size": 384}
    provider = from_hf_config(config)
    (operations,) = ranks.run(_counted_in_megatron, 1, config, 32)
    of_weights = sum(count for kind, count in operations.items() if kind not in BATCHED)
    heads, channels = provider.num_attention_heads, provider.qk_head_dim + provider.qk_pos_emb_head_dim + provider.v_head_dim
    chosen = (32**2 - (32 - provider.dsa_indexer_topk) ** 2) / 2
    scores = 3 * provider.num_layers * 2 * heads * channels * chosen
    indexers = provider.num_layers if family == "deepseek_v32" else 3
    up = heads * (provider.qk_head_dim + provider.v_head_dim) * provider.kv_lora_rank
    scores += indexers * 2 * provider.dsa_indexer_n_heads * provider.dsa_indexer_head_dim * 32**2 / 2
    assert flops_per_token(provider, 32) * 32 == of_weights + 6 * 32 * provider.num_layers * up + scores
