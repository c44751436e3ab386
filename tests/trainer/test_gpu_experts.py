"""On GPUs with Transformer Engine: mixtures of experts have transformers' logits and the CPU's losses, with grouped experts and
without, at expert parallelism, recomputed, and in FP8. Left out by `make test`; `-s` prints the figures."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch

from converter import families, hf_to_mcore
from tests.converter.family_suite import TOKENS, small_model
from tests.trainer import small
from tests.trainer.test_gpu_families import PRECISIONS, TRAINED, by_transformers, logits_of_each, skip_without_kernels
from tests.trainer.test_prediction_training import folder as predicting  # noqa: F401 - a fixture

pytestmark = pytest.mark.gpu

FAMILIES = [name for name in TRAINED if any("mlp.router.weight" in rule.megatron for rule in families.find(name).RULES)]
CURVES = [name for name in ("mixtral", "qwen3_moe", "deepseek_v3", "gpt_oss") if name in FAMILIES]
STEPS = 10
GPU = {"dist__device": "gpu"}
RUN = {"train__train_iters": STEPS, "scheduler__lr_decay_iters": 20, "optimizer__lr": 1e-3, "optimizer__min_lr": 1e-4}
"""A larger step makes more of what rounding began."""

ROWS = np.random.default_rng(6).integers(0, 384, (64, len(TOKENS[0]))).tolist()
"""Enough tokens that those near the border between two experts, which go to another one in bf16, are as many there as here."""

TP, EP, ETP = "tensor_model_parallel_size", "expert_model_parallel_size", "expert_tensor_parallel_size"
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "grouped": (1, {}),
    "one by one": (1, {"moe_grouped_gemm": False, "moe_permute_fusion": False}),
    "ep2": (2, {EP: 2}),
    "tp2": (2, {TP: 2}),
    "tp2 ep2 etp1": (2, {TP: 2, EP: 2, ETP: 1}),
}


def skip_without(world: int) -> None:
    if torch.cuda.device_count() < world:
        pytest.skip("needs two GPUs")


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """A small model of each family in bf16 and in fp32, converted."""
    made = tmp_path_factory.mktemp("experts")
    for name in FAMILIES:
        small_model(name).save_pretrained(made / name / "hf")
        for precision, dtype in (("fp32", "fp32"), ("bf16_mixed", "keep")):
            hf_to_mcore(made / name / "hf", made / name / f"megatron_{precision}", dtype=dtype)
    return made


@pytest.fixture(scope="module", params=LAYOUTS)
def measured(request, ranks, work):
    """The logits of all families at a layout, loaded strictly."""
    world, settings = LAYOUTS[request.param]
    skip_without(world)
    return request.param, ranks.run(logits_of_each, world, str(work), FAMILIES, settings, ROWS)[0]


@pytest.mark.parametrize("name", FAMILIES)
def test_logits_are_those_of_transformers(name, measured, work):
    layout, logits = measured
    wrong = [text for key, text in logits.items() if key[0] == name and not isinstance(text, torch.Tensor)]
    skip_without_kernels(wrong)
    assert not wrong, wrong
    exact = by_transformers(work / name / "hf", "float32", ROWS)
    fp32, bf16 = (logits[name, precision][..., : exact.shape[-1]] for precision in PRECISIONS)
    theirs = (by_transformers(work / name / "hf", "bfloat16", ROWS) - exact).abs()
    ours, largest = (bf16 - exact).abs(), exact.abs().max().item()
    difference = (fp32 - exact).abs().max().item() / largest
    print(
        f"\n{name}, {layout}: fp32 {difference:.1e} of the largest logit; bf16 mean error {ours.mean():.2e}, transformers' own "
        f"{theirs.mean():.2e}, ratio of medians {ours.median() / theirs.median():.2f}"
    )
    assert difference < 1e-3
    # A token near the border between two experts may go to another one in bf16, there as here: medians leave those out.
    assert ours.median() <= theirs.median() * 1.25


@dataclass
class Observer(small.History):
    """Notes which class computes experts, and the dtype of biases of routers."""

    experts: set[str] = field(default_factory=set)
    biases: set[torch.dtype] = field(default_factory=set)

    def on_end(self, run: Any) -> None:
        for module in (module for chunk in run.chunks for module in chunk.modules()):
            if hasattr(module, "experts"):
                self.experts.add(type(module.experts).__name__)
            if getattr(module, "expert_bias", None) is not None:
                self.biases.add(module.expert_bias.dtype)


def train(path: str, changes: dict[str, Any]) -> Observer:
    """Run on this rank."""
    from pathlib import Path

    from trainer.loop import pretrain

    seen = Observer()
    pretrain(small.settings(Path(path), **{**RUN, **changes}), callbacks=[seen])
    return seen


def on_gpu(settings: dict[str, Any]) -> dict[str, Any]:
    return {**GPU, **{f"model__{name}": value for name, value in settings.items()}}


@pytest.fixture(scope="module")
def on_the_cpu(ranks, family_folder):
    """The losses of each family with megatron-core's own layers."""
    return {name: ranks.run(train, 1, str(family_folder(name)), {})[0] for name in CURVES}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", CURVES)
def test_losses_in_fp32_are_those_of_the_cpu(name, layout, ranks, family_folder, on_the_cpu):
    world, settings = LAYOUTS[layout]
    skip_without(world)
    cpu, gpu = on_the_cpu[name], ranks.run(train, world, str(family_folder(name)), on_gpu(settings))[-1]
    print(
        f"\n{name}, {layout}: largest difference of losses", max(abs(a - b) for a, b in zip(cpu.losses, gpu.losses, strict=True))
    )
    assert gpu.losses == pytest.approx(cpu.losses, abs=1e-3)
    assert gpu.layers[0] == pytest.approx(cpu.layers[0], rel=1e-3)
    assert gpu.experts == {"SequentialMLP" if layout == "one by one" else "TEGroupedMLP"}
    assert gpu.biases == cpu.biases <= {torch.float32}


SAME: dict[str, tuple[int, dict[str, Any]]] = {
    "experts recomputed": (1, {"recompute_granularity": "selective", "recompute_modules": ["moe"]}),
    "activations of experts recomputed": (1, {"recompute_granularity": "selective", "recompute_modules": ["moe_act"]}),
    "all layers recomputed": (1, {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}),
    "allgather": (2, {EP: 2, "moe_token_dispatcher_type": "allgather"}),
    "shared experts beside the messages": (2, {EP: 2, "moe_shared_expert_overlap": True}),
}


@pytest.mark.parametrize("name", SAME)
def test_what_saves_memory_or_time_changes_no_loss(name, ranks, family_folder, on_the_cpu):
    world, settings = SAME[name]
    skip_without(world)
    family = "deepseek_v3" if "deepseek_v3" in CURVES else CURVES[0]
    (*_, gpu) = ranks.run(train, world, str(family_folder(family)), on_gpu(settings))
    assert gpu.losses == pytest.approx(on_the_cpu[family].losses, abs=1e-3)


def test_layers_of_multi_token_prediction_have_the_losses_of_the_cpu(predicting, ranks):  # noqa: F811 - the fixture
    (cpu,), (gpu,) = (ranks.run(train, 1, str(predicting), changes) for changes in ({}, GPU))
    assert gpu.losses == pytest.approx(cpu.losses, abs=1e-3)
    assert [step["mtp_1_loss"] for step in gpu.layers] == pytest.approx([step["mtp_1_loss"] for step in cpu.layers], abs=1e-3)


WIDE = {"hidden_size": 256, "intermediate_size": 256, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64}
"""What FP8's blocks take."""


@pytest.mark.parametrize(
    ("precision", "tolerance"),
    [
        ("bf16_mixed", 0.05),
        ("fp16_mixed", 0.05),
        ("bf16_with_fp8_delayed_scaling_mixed", 0.06),
        ("bf16_with_fp8_current_scaling_mixed", 0.06),
        ("bf16_with_fp8_subchannel_scaling_mixed", 0.06),
    ],
)
def test_grouped_experts_train_in_8_and_16_bits(precision, tolerance, ranks, family_folder):
    path = str(family_folder("mixtral", **WIDE))
    # Of 512 tokens a step, a few go to another expert in 8 bits and move the loss by 0.1: of 2,048 it moves by a third of that.
    long = {**GPU, "dataset__sequence_length": 128, "train__global_batch_size": 16}
    # The auxiliary loss shows whether its gradient has the loss scale of fp16. Gradients are sums over tokens, and a larger scale
    # would leave out steps until it has come down.
    long |= {"model__moe_aux_loss_coeff": 1.0, "optimizer__initial_loss_scale": 2.0**4}
    (exact,) = ranks.run(train, 1, path, long)
    (rounded,) = ranks.run(train, 1, path, {**long, "mixed_precision": precision})
    print(f"\n{precision}: last loss {rounded.losses[-1]:.4f}, in fp32 {exact.losses[-1]:.4f}, largest difference",
          max(abs(a - b) for a, b in zip(rounded.losses, exact.losses, strict=True)))  # fmt: skip
    assert rounded.losses == pytest.approx(exact.losses, abs=tolerance)
    assert rounded.layers[-1]["load_balancing_loss"] == pytest.approx(exact.layers[-1]["load_balancing_loss"], abs=tolerance)
    assert rounded.experts == {"TEGroupedMLP"}
