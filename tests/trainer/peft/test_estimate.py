"""What adapters add to a model's sizes, against megatron-core's models with adapters in them and what torch keeps of them."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.trainer.settings import HOPPER, settings
from trainer.config import FinetuningDatasetConfig, RunConfig
from trainer.estimate.built import count_each_rank, count_whole
from trainer.estimate.memory import memory
from trainer.peft import PEFT, DoRA, LoRA
from trainer.settings.resolve import resolve

SPLIT = {"model__num_query_groups": 4, "model__num_attention_heads": 8}
METHODS: dict[str, PEFT] = {
    "lora": LoRA(dim=4),
    "canonical": LoRA(dim=4, canonical=True),
    "dora": DoRA(dim=4),
    "canonical dora": DoRA(dim=4, canonical=True),
    "attention alone": DoRA(dim=8, target_modules=["linear_qkv", "linear_proj"]),
    "some layers": LoRA(dim=4, target_modules=["*.layers.1.*.linear_*", "linear_fc2"], exclude_modules=["*.layers.3.*"]),
    "some parts": DoRA(dim=4, canonical=True, target_modules=["linear_q", "linear_v", "linear_fc1"], exclude_modules=["*_gate"]),
}
EXPERTS = {
    "model__num_moe_experts": 4,
    "model__hf_config": {},  # no Llama any more
    "model__moe_layer_freq": [1, 0, 1, 1],
    "model__moe_ffn_hidden_size": 48,
    "model__moe_shared_expert_intermediate_size": 32,
}
LAYOUTS: dict[str, dict[str, Any]] = {
    "one": {},
    "tensor": {"model__tensor_model_parallel_size": 2},
    "pipeline": {"model__pipeline_model_parallel_size": 2, "model__virtual_pipeline_model_parallel_size": 2},
    "experts": {"model__expert_model_parallel_size": 2, **EXPERTS},
    "divided experts": {"model__tensor_model_parallel_size": 2, **EXPERTS},
}


def attached(config: RunConfig) -> tuple[int, int]:
    """Trained parameters on this rank, and of the whole model."""
    from trainer import parallel
    from trainer.model import build
    from trainer.peft.attach import attach

    with parallel.session(config, "cpu"):
        chunks = build(config.model)
        whole = attach(chunks, config.peft).trained
        return sum(parameter.numel() for chunk in chunks for parameter in chunk.parameters() if parameter.requires_grad), whole


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_adapters_are_as_large_as_those_that_are_attached(ranks: Any, layout: str, method: str) -> None:
    world = 1 if layout == "one" else 2
    config = settings(mixed_precision="fp32", peft=METHODS[method], **LAYOUTS[layout])
    resolved = resolve(config, world_size=world, device="cpu").config
    counts = [held.trained.total for _, held in count_each_rank(resolved.model, resolved.peft)]
    each = counts * (world // len(counts))  # ranks of one stage have as much: no method here chooses experts by their numbers
    trained = count_whole(resolved.model, resolved.peft).trained.total
    assert ranks.run(attached, world, resolved) == [(count, trained) for count in each]


def test_ranks_with_other_experts_may_have_more() -> None:
    layout = {**LAYOUTS["experts"], "peft": LoRA(dim=4, target_modules=["*.layers.0.*.local_experts.3.linear_fc2"])}
    model = resolve(settings(mixed_precision="fp32", **layout), world_size=2, device="cpu").config
    assert [held.trained.experts for _, held in count_each_rank(model.model, model.peft)] == [0, 4 * (48 + 64)]


def test_weights_of_a_frozen_model_are_all_there_is_of_them() -> None:
    for sharded, optimizer in ((False, 12), (True, 3)):
        config = settings(peft=LoRA(dim=4), mixed_precision="bf16_mixed", ddp__use_distributed_optimizer=sharded)
        sizes = parts(config, world_size=4)
        resolved = resolve(config, world_size=4, device="gpu", machine=HOPPER).config
        ((_, held),) = count_each_rank(resolved.model, resolved.peft)
        trained = held.trained.total
        assert sizes["weights"] == 2 * held.frozen.total
        assert (sizes["adapters"], sizes["gradients"], sizes["optimizer"]) == (2 * trained, 4 * trained, optimizer * trained)


def parts(config: RunConfig, *, world_size: int = 1, device: str = "gpu") -> dict[str, int]:
    machine = HOPPER if device == "gpu" else None
    resolved = resolve(config, world_size=world_size, device=device, machine=machine).config
    return {part.name: part.size for part in memory(resolved, world_size=world_size).parts}


def kept(config: RunConfig) -> int:
    """Bytes that torch keeps of one microbatch for the backward pass, parameters left out."""
    from trainer import parallel
    from trainer.model import build
    from trainer.peft.attach import attach

    seen: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        seen[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with parallel.session(config, "cpu"):
        (chunk,) = build(config.model)
        attach([chunk], config.peft)
        tokens = torch.arange(config.dataset.sequence_length)[None] % 97
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            loss = chunk(tokens, torch.arange(tokens.shape[1])[None], None, labels=tokens)
        own = {parameter.untyped_storage().data_ptr() for parameter in chunk.parameters()}
        assert loss.requires_grad
        return sum(tensor.untyped_storage().nbytes() for pointer, tensor in seen.items() if pointer not in own)


ALL = ["linear_qkv", "linear_proj", "linear_fc1", "linear_fc2"]


@pytest.mark.parametrize("left_out", ["linear_fc1", "linear_fc2"])
def test_an_adapter_keeps_its_layers_input_and_what_it_makes_of_it(ranks: Any, left_out: str) -> None:
    """Attention's output is another thing: only flash attention keeps it anyway."""
    whole, less = (
        settings(mixed_precision="fp32", peft=LoRA(dim=4, target_modules=[name for name in ALL if name != left]))
        for left in (None, left_out)
    )
    resolved = [resolve(config, world_size=1, device="cpu").config for config in (whole, less)]
    with_it, without = (ranks.run(kept, 1, config)[0] for config in resolved)
    estimated = parts(whole, device="cpu")["activations"] - parts(less, device="cpu")["activations"]
    assert with_it - without == estimated > 0


def test_a_magnitude_keeps_the_output_that_it_scales(ranks: Any) -> None:
    methods = [settings(mixed_precision="fp32", peft=made(dim=4)) for made in (DoRA, LoRA)]
    dora, lora = (ranks.run(kept, 1, resolve(config, world_size=1, device="cpu").config)[0] for config in methods)
    estimated = [parts(config, device="cpu") for config in methods]
    rows = estimated[0]["lengths of rows"]
    # Beside the outputs, torch keeps the norms and the factors: one number each per row.
    assert dora - lora == estimated[0]["activations"] - estimated[1]["activations"] + 2 * rows


@pytest.mark.parametrize(("dropout", "dtype"), [(0.0, None), (0.5, None), (0.0, "fp64")])
def test_a_routers_adapter_keeps_its_input_where_that_is_another_and_what_it_makes_of_it(ranks, dropout, dtype) -> None:
    """Of the last layer, which gradients reach both times."""
    lora = {"dim": 4, "dropout": dropout}
    whole, less = (
        settings(
            mixed_precision="fp32",
            peft=LoRA(target_modules=["*.layers.3.*.linear_proj", *routers], **lora),
            model__moe_router_dtype=dtype,
            **EXPERTS,
        )
        for routers in (["*.layers.3.*.router"], [])
    )
    resolved = [resolve(config, world_size=1, device="cpu").config for config in (whole, less)]
    with_it, without = (ranks.run(kept, 1, config)[0] for config in resolved)
    estimated = parts(whole, device="cpu")["activations"] - parts(less, device="cpu")["activations"]
    # The CPU's dropout keeps a mask in fp32, a GPU's in bytes. A and B of 64 inputs and 4 experts are copied to fp64.
    other = 128 * 64 * 3 if dropout else 4 * (64 + 4) * 8 if dtype else 0
    assert with_it - without == estimated + other > other


def test_layers_before_the_first_adapter_keep_nothing(ranks: Any) -> None:
    common = {"mixed_precision": "fp32", "model__vocab_size": 128}
    upper = settings(peft=LoRA(dim=4, target_modules=["*.layers.2.*.linear_*", "*.layers.3.*.linear_*"]), **common)
    every = settings(peft=LoRA(dim=4), **common)
    assert parts(upper)["activations"] * 2 == parts(every)["activations"]
    stages = {"model__pipeline_model_parallel_size": 2}
    gradients = settings(peft=LoRA(dim=4, target_modules=["*.layers.3.*.linear_*"]), **common, **stages)
    assert parts(gradients, world_size=2)["activations"] > 0


def test_fp8_keeps_adapters_inputs_as_they_are_and_frozen_layers_none() -> None:
    """Per token and layer: Transformer Engine's layers with a norm keep their quantized copy too, once they hand it out."""
    fp8 = {"mixed_precision": "bf16_with_fp8_current_scaling_mixed", "model__first_last_layers_bf16": False}
    sizes = {"model__hidden_size": 64, "model__ffn_hidden_size": 96, "model__kv_channels": 8, **SPLIT}
    r, tokens, layers = 4, 128, 4
    attention = 2 * (2 * 64 + 2 * 32) + 4 * 8
    frozen = 2 * (2 * 64 + 4) + attention + 2 * 2 * 96
    every = {name: LoRA(dim=r, target_modules=[name]) for name in ALL}
    added = {"linear_qkv": 3 * 64, "linear_proj": 0, "linear_fc1": 3 * 64, "linear_fc2": 2 * 96}
    for name, method in every.items():
        estimated = parts(settings(peft=method, **fp8, **sizes))
        assert estimated["activations"] == tokens * layers * (frozen + added[name] + 2 * r), name


def test_layers_left_in_bf16_are_not_quantized() -> None:
    fp8 = {"mixed_precision": "bf16_with_fp8_current_scaling_mixed"}
    every, some = (parts(settings(peft=LoRA(dim=4), **fp8, model__first_last_layers_bf16=first)) for first in (False, True))
    config = settings(**fp8, model__first_last_layers_bf16=False)
    ((_, held),) = count_each_rank(resolve(config, world_size=1, device="gpu", machine=HOPPER).config.model)
    assert every["weights"] - some["weights"] == 2 * held.matrices // 2
    assert every["activations"] - some["activations"] == 2 * 128 * 2 * 64


class Mine(LoRA):
    """A method of somebody's own: it may do anything."""


def test_of_a_method_of_ones_own_all_is_counted_but_what_it_keeps_of_a_step() -> None:
    mine, lora = (parts(settings(peft=method(dim=4), mixed_precision="bf16_mixed")) for method in (Mine, LoRA))
    names = ("weights", "adapters", "gradients", "optimizer")
    assert [mine[name] for name in names] == [lora[name] for name in names]
    resolved = resolve(settings(peft=Mine()), world_size=1, device="gpu", machine=HOPPER).config
    estimated = {part.name: part for part in memory(resolved, world_size=1).parts}
    assert "what `Mine` keeps is not counted" in estimated["activations"].why


def test_packed_rows_have_a_mask_on_the_cpu_alone() -> None:
    for device, expected in (("cpu", 2 * 64 * 64), ("gpu", None)):
        config = settings(train__micro_batch_size=2, mixed_precision="bf16_mixed" if device == "gpu" else "fp32")
        config.dataset = FinetuningDatasetConfig(sequence_length=64)
        sizes = parts(config, device=device)
        assert sizes.get("attention mask") == expected
        config.dataset.packed = False
        assert "attention mask" not in parts(config, device=device)
