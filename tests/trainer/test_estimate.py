"""Sizes and memory against transformers' and megatron-core's models, and the published counts."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests import models
from tests.trainer.settings import HOPPER, LLAMA, settings
from trainer import recipes
from trainer.config import RunConfig
from trainer.estimate.activations import _in_flight
from trainer.estimate.built import count_each_rank
from trainer.estimate.memory import Estimate, memory, parameters
from trainer.model import from_hf_config
from trainer.settings.resolve import resolve

LLAMA_1B = {
    "model_type": "llama", "vocab_size": 128256, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16,
    "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 64, "max_position_embeddings": 131072,
    "tie_word_embeddings": True,
}  # fmt: skip


def on_meta(config: Any) -> int:
    """Parameters of transformers' model, which counts tied weights once."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config).num_parameters()


@pytest.mark.parametrize("variant", ["gqa", "mha", "mqa", "head_dim", "tied", "padded_vocab", "both_biases"])
def test_parameters_are_those_of_transformers(variant: str) -> None:
    from transformers import LlamaConfig

    config = {**LLAMA, **models.VARIANTS[variant]}
    assert parameters(from_hf_config(config)) == on_meta(LlamaConfig(**config))


def test_parameters_of_a_model_people_use() -> None:
    from transformers import LlamaConfig

    assert parameters(from_hf_config(LLAMA_1B)) == on_meta(LlamaConfig(**LLAMA_1B)) == 1_235_814_400


def test_parameters_of_experts_and_head_norms() -> None:
    from transformers import Qwen3MoeConfig

    sizes = {**models.BASE, "head_dim": 12}
    config = Qwen3MoeConfig(**sizes, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=48, decoder_sparse_step=1)
    provider = from_hf_config({**LLAMA, "head_dim": 12})
    provider.num_moe_experts, provider.moe_ffn_hidden_size, provider.qk_layernorm = 4, 48, True
    assert parameters(provider) == on_meta(config)


def parameters_per_rank(provider: Any) -> list[int]:
    """Of one rank of each pipeline stage."""
    return [held.total for _, held in count_each_rank(provider)]


def built(config: RunConfig) -> int:
    """Parameters of what megatron-core builds on this rank."""
    from trainer import parallel
    from trainer.model import build

    with parallel.session(config, "cpu"):
        return sum(parameter.numel() for chunk in build(config.model) for parameter in chunk.parameters())


LAYOUTS: dict[str, dict[str, Any]] = {
    "one": {},
    "tensor": {"model__tensor_model_parallel_size": 2, "model__add_bias_linear": True},
    "pipeline": {"model__pipeline_model_parallel_size": 2},
    "virtual": {"model__pipeline_model_parallel_size": 2, "model__virtual_pipeline_model_parallel_size": 2},
    "uneven": {"model__pipeline_model_parallel_size": 2, "model__num_layers_in_first_pipeline_stage": 1},
    "laid out": {"model__pipeline_model_parallel_size": 2, "model__pipeline_model_parallel_layout": "Et|t|t|tL"},
    "experts": {
        "model__expert_model_parallel_size": 2,
        "model__num_moe_experts": 4,
        "model__hf_config": {},  # no Llama any more
        "model__moe_layer_freq": [1, 0, 1, 1],
        "model__moe_ffn_hidden_size": 48,
    },
}


@pytest.mark.parametrize("variant", ["tied", "padded_vocab"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_parameters_of_each_rank_are_what_megatron_core_builds(ranks: Any, layout: str, variant: str) -> None:
    changes = LAYOUTS[layout]
    world = 1 if layout == "one" else 2
    resolved = resolve(settings(variant, mixed_precision="fp32", **changes), world_size=world, device="cpu").config
    stage = resolved.model.pipeline_model_parallel_size > 1
    each = parameters_per_rank(resolved.model)
    expected = [each[rank if stage else 0] for rank in range(world)]
    assert ranks.run(built, world, resolved) == expected


def parts(config: RunConfig, *, world_size: int = 1) -> tuple[Estimate, dict[str, int]]:
    resolved = resolve(config, world_size=world_size, device="gpu", machine=HOPPER).config
    estimate = memory(resolved, world_size=world_size)
    return estimate, {part.name: part.size for part in estimate.parts}


@pytest.mark.parametrize(
    ("precision", "fp32_gradients", "alone", "shared"),
    [("fp32", None, 16, 8), ("bf16_mixed", None, 18, 6), ("bf16_mixed", False, 20, 4), ("fp16_mixed", None, 20, 4)],
)
def test_bytes_per_parameter_are_those_megatron_documents(
    precision: str, fp32_gradients: bool | None, alone: int, shared: int
) -> None:
    """Megatron-LM, docs/source/api-guide/dist_optimizer: 20 and 4 + 16/d, 18 and 6 + 12/d, 16 and 8 + 8/d."""
    for sharded, expected in ((False, alone), (True, shared + (alone - shared) / 4)):
        config = settings(
            mixed_precision=precision, ddp__use_distributed_optimizer=sharded, ddp__grad_reduce_in_fp32=fp32_gradients
        )
        _, sizes = parts(config, world_size=4)
        (count,) = parameters_per_rank(resolve(config, world_size=4, device="gpu", machine=HOPPER).config.model)
        assert sizes["weights"] + sizes["gradients"] + sizes["optimizer"] == int(expected * count)


def test_activations_without_flash_attention_are_those_of_the_paper_less_its_dropout_masks() -> None:
    """Korthikanti et al. 2022, equation 1: 34 bytes per token and channel, 5 per token, head and token of the sequence; of
    which 2 and 1 are dropout masks. Beside them our count has fp32 statistics: 2 norms and one per head."""
    from megatron.core.transformer.enums import AttnBackend

    config = settings(
        "mha",
        model__attention_backend=AttnBackend.unfused,
        model__hf_config={},  # no Llama any more
        model__gated_linear_unit=False,
        model__activation_func=torch.nn.functional.gelu,
        model__bias_activation_fusion=False,
        model__ffn_hidden_size=4 * 64,
    )
    _, sizes = parts(config)
    tokens, heads = 128, 8
    assert sizes["activations"] == 4 * tokens * ((34 - 2) * 64 + (5 - 1) * heads * tokens + 4 * 2 + 4 * heads)


@pytest.mark.parametrize(
    ("recipe", "gpus", "sizes", "fp8", "measured"),
    [
        ("llama32_1b", 1, (4096, 4, 16), False, 47.3),
        ("llama32_1b", 1, (4096, 4, 16), True, 46.1),
        ("llama32_3b", 1, (8192, 1, 4), True, 79.4),
        ("llama3_8b", 2, (4096, 1, 8), False, 108.9),
        ("llama3_8b", 2, (4096, 1, 8), True, 119.2),
    ],
)
def test_the_estimate_is_what_an_h200_measured(recipe, gpus, sizes, fp8, measured) -> None:
    """docs/performance.md: GiB at most allocated, Transformer Engine's kernels, data parallel alone, FP8 in every layer."""
    from trainer.recipes import find
    from trainer.settings.fields import field_path

    config = find(recipe).pretrain_config()
    changes: dict[str, Any] = dict(
        zip(("dataset.sequence_length", "train.micro_batch_size", "train.global_batch_size"), sizes, strict=True)
    )
    if fp8:
        changes |= {"mixed_precision": "bf16_with_fp8_current_scaling_mixed", "model.first_last_layers_bf16": False}
    alone = {"model.tensor_model_parallel_size": 1, "model.sequence_parallel": False}
    fused = {"model.cross_entropy_loss_fusion": True, "model.cross_entropy_fusion_impl": "te"}
    for name, value in {**alone, **fused, **changes}.items():
        field_path(config, name).set(value)
    resolved = resolve(config, world_size=gpus, device="gpu", machine=replace(HOPPER, transformer_engine="2.20.2"))
    assert memory(resolved.config, world_size=gpus).total == pytest.approx(measured * 2**30, rel=0.01)


def test_recomputing_keeps_one_input_per_layer() -> None:
    whole = parts(settings())[1]
    full = parts(settings(model__recompute_granularity="full", model__recompute_method="uniform", model__recompute_num_layers=1))[
        1
    ]
    assert full["activations"] == 4 * 128 * 64 * 2
    assert full["recomputation"] == whole["activations"] // 4
    some = parts(settings(model__recompute_granularity="selective", model__recompute_modules=["mlp"]))[1]
    assert some["activations"] == whole["activations"] - 4 * 128 * 3 * 96 * 2


def test_ranks_divide_what_they_share() -> None:
    size = {"model__vocab_size": 512}  # needs no padding
    whole = parts(settings(**size))[1]
    split = parts(settings(model__tensor_model_parallel_size=2, model__sequence_parallel=True, **size), world_size=2)[1]
    statistics = 4 * 128 * 4 * 2  # of the norms of 4 layers: every rank keeps its tokens', and half is counted twice
    assert split["activations"] == (whole["activations"] + statistics) // 2
    assert split["logits"] * 2 == whole["logits"]
    context = parts(settings(model__context_parallel_size=2, **size), world_size=2)[1]
    assert context["activations"] * 2 == whole["activations"]
    assert context["weights"] == whole["weights"]


@pytest.mark.parametrize(("pipeline", "virtual", "count"), [(4, None, 8), (4, None, 2), (4, 2, 8), (2, 2, 2), (4, 3, 4)])
def test_microbatches_in_flight_are_those_of_megatron_cores_schedule(pipeline: int, virtual: int | None, count: int) -> None:
    from megatron.core.pipeline_parallel.schedules import get_pp_rank_microbatches

    for rank in range(pipeline):
        group = SimpleNamespace(size=lambda: pipeline, rank=lambda rank=rank: rank)
        communicator = SimpleNamespace(pp_group=group, virtual_pipeline_model_parallel_size=virtual)
        total, _, warm_up, _ = get_pp_rank_microbatches(count, virtual or 1, pipeline, p2p_communicator=communicator)
        model = SimpleNamespace(
            pipeline_model_parallel_size=pipeline,
            virtual_pipeline_model_parallel_size=virtual,
            microbatch_group_size_per_vp_stage=pipeline,
        )
        # In the steady state one more goes forward before one comes back.
        assert _in_flight(model, rank, count) * (virtual or 1) == min(total, warm_up + 1)


def test_the_first_of_two_stages_is_the_fullest_where_it_keeps_more_microbatches() -> None:
    config = settings("tied", model__pipeline_model_parallel_size=2, train__micro_batch_size=4, dataset__sequence_length=256)
    config.train.global_batch_size = 16
    config.model.vocab_size = 128
    estimate, sizes = parts(config, world_size=2)
    assert estimate.pp_rank == 0
    assert estimate.total == sum(sizes.values())
    assert all(part.why for part in estimate.parts)


@pytest.mark.parametrize("name", [name for name in recipes.every() if name.startswith("llama")])
def test_recipes_have_the_parameters_of_their_model_and_fit_their_gpus(name: str) -> None:
    from transformers import LlamaConfig

    recipe = recipes.find(name)
    config = recipe.pretrain_config()
    assert parameters(config.model) == on_meta(LlamaConfig(**config.model.hf_config))
    resolved = resolve(config, world_size=recipe.gpus or 1, device="gpu" if recipe.gpus else "cpu", machine=HOPPER)
    assert memory(resolved.config, resolved.world_size).total < 80e9


def test_a_large_model_is_counted_without_its_memory() -> None:
    """TP8·PP4·VPP5: the numbers of the first stage and of the last, which has no embedding and one norm more."""
    resolved = resolve(recipes.find("llama3_70b").pretrain_config(), world_size=32, device="gpu", machine=HOPPER)
    assert parameters_per_rank(resolved.config.model)[::3] == [2_271_543_296, 2_271_551_488]


@pytest.mark.parametrize("machine", [HOPPER, None])
def test_the_estimate_of_gpus_is_the_same_where_there_are_none(machine: Any) -> None:
    """`machine` is None where it is this one, without Transformer Engine."""
    config = recipes.find("llama32_1b").pretrain_config()
    resolved = resolve(config, world_size=1, device="gpu", machine=machine).config
    sizes = {part.name: part.size for part in memory(resolved, world_size=1).parts}
    assert sizes["logits"] == 4 * 8192 * 128256


def test_what_caps_keep_is_counted() -> None:
    """A cap of scores: two matrices of them in each layer. A cap of logits: what tanh made of them."""

    def parts_of(**changes: Any) -> dict[str, int]:
        config = recipes.find("gemma2_2b").peft_config()
        config.model.recompute_granularity = config.model.recompute_modules = None
        for name, value in changes.items():
            setattr(config.model, name, value)
        resolved = resolve(config, world_size=1, device="gpu", machine=HOPPER).config
        return {part.name: part.size for part in memory(resolved, world_size=1).parts}

    capped = parts_of()
    plain = parts_of(attn_logit_softcapping=None, final_logit_softcapping=None)
    assert capped["activations"] - plain["activations"] == 26 * 4096 * 2 * 2 * 8 * 4096
    assert capped["logits"] - plain["logits"] == 2 * 4096 * 256000
