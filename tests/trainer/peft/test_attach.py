"""Which modules a method changes, what is said of it, and what cannot be."""

from __future__ import annotations

from pathlib import Path

import pytest

from formats.errors import UserError
from tests.trainer import small
from trainer.peft.targets import fits, matching_patterns, targeted_names

QKV = "decoder.layers.3.self_attention.linear_qkv"


@pytest.mark.parametrize(
    ("pattern", "matches"),
    [
        ("linear_qkv", True),
        ("linear_q", False),
        ("linear_*", True),
        ("*.layers.3.*.linear_qkv", True),
        ("*.layers.0.*.linear_qkv", False),
        ("*.self_attention.*", True),
        (QKV, True),
        ("self_attention.linear_qkv", False),
        ("Linear_qkv", False),
    ],
)
def test_a_pattern_without_a_dot_is_for_the_last_name(pattern, matches):
    assert fits(pattern, QKV) == matches
    assert bool(matching_patterns([pattern], [QKV])) == matches


def test_exclusions_win_and_the_name_of_the_whole_stands_for_its_parts():
    parts = [f"decoder.layers.3.self_attention.linear_{letter}" for letter in "qkv"]
    assert targeted_names(QKV, parts, ["linear_q", "linear_v"], []) == [parts[0], parts[2]]
    assert targeted_names(QKV, parts, ["linear_qkv"], ["linear_k"]) == [parts[0], parts[2]]
    assert targeted_names(QKV, parts, ["linear_q"], ["linear_qkv"]) == []
    assert targeted_names(QKV, parts, ["*.layers.3.*.linear_v"], ["*.layers.2.*"]) == [parts[2]]
    assert targeted_names(QKV, [QKV], ["*"], ["*.layers.3.*"]) == []


def _attach(folder, changes, kind, settings):
    """What attaching says, and the names of what is trained here; or why it cannot be."""
    from trainer import model, parallel, peft
    from trainer.peft.attach import attach
    from trainer.settings.resolve import resolve

    world = parallel.world_size()
    config = resolve(small.settings(Path(folder), **changes), world_size=world, device="cpu").config
    with parallel.session(config, "cpu"):
        chunks = model.build(config.model)
        try:
            message = str(attach(chunks, getattr(peft, kind)(**settings)))
        except UserError as error:
            return str(error), []
        frozen = [parameter for chunk in chunks for name, parameter in chunk.named_parameters() if ".adapter." not in name]
        assert not any(parameter.requires_grad for parameter in frozen)
        return message, [name for name, _ in peft.trainable(chunks)]


@pytest.mark.parametrize(
    ("world", "changes"),
    [
        (2, {"model__tensor_model_parallel_size": 2}),
        (2, {"model__pipeline_model_parallel_size": 2}),
        (4, {"model__tensor_model_parallel_size": 2}),
    ],
    ids=["tp", "pp", "tp_dp"],
)
def test_counts_are_of_the_whole_model(world, changes, ranks, model_folder):
    """4 layers of 64 features and 384 tokens; A and B of rank 4."""
    from transformers import AutoModelForCausalLM

    folder = str(model_folder("gqa"))
    shape = AutoModelForCausalLM.from_pretrained(folder)
    attention, mlp = shape.model.layers[0].self_attn, shape.model.layers[0].mlp
    fused = [[attention.q_proj, attention.k_proj, attention.v_proj], [attention.o_proj]]
    fused += [[mlp.gate_proj, mlp.up_proj], [mlp.down_proj]]
    trained = 4 * sum(4 * (layers[0].in_features + sum(part.out_features for part in layers)) for layers in fused)
    changes = {"model__make_vocab_size_divisible_by": 1, **changes}
    for message, _ in ranks.run(_attach, world, folder, changes, "LoRA", {"dim": 4}):
        every = trained + sum(parameter.numel() for parameter in shape.parameters())
        assert message == f"LoRA: {trained} of {every} parameters are trained ({100 * trained / every:.2f} %), 16 modules"


def test_a_large_model_is_told_in_short():
    from trainer.peft.attach import Attached

    message = str(Attached("LoRA", 41_943_040, 8_072_204_288, 128))
    assert message == "LoRA: 41.9 M of 8.07 B parameters are trained (0.52 %), 128 modules"


def test_parts_of_a_fused_layer_can_be_trained_alone(ranks, model_folder):
    settings = {
        "canonical": True,
        "target_modules": ["*.layers.1.*.linear_q", "linear_fc1_up"],
        "exclude_modules": ["*.layers.0.*"],
    }
    stages = ranks.run(_attach, 2, str(model_folder("gqa")), {"model__pipeline_model_parallel_size": 2}, "DoRA", settings)
    names = {
        name.rpartition(".adapter.")[0] + " " + name.split(".adapter.")[1].split(".")[0]
        for _, trained in stages
        for name in trained
    }
    up = {f"decoder.layers.{number}.mlp.linear_fc1 adapter_up" for number in (1, 2, 3)}
    assert names == up | {"decoder.layers.1.self_attention.linear_qkv adapter_q"}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"target_modules": ["linear_qvk"]},
            "`peft.target_modules` has `linear_qvk`, which matches no module of the model\n\nhint: did you mean `linear_qkv`",
        ),
        (
            {"target_modules": ["linear_q"]},
            "`peft.target_modules` has `linear_q`, which matches no module of the model",
        ),
        (
            {"target_modules": ["*.layers.7.*.linear_qkv"]},
            "`peft.target_modules` has `*.layers.7.*.linear_qkv`, which matches no module of the model",
        ),
        (
            {"exclude_modules": ["linear_fc3"]},
            "`peft.exclude_modules` has `linear_fc3`, which matches no module of the model",
        ),
        (
            {"target_modules": ["final_layernorm"]},
            "`decoder.final_layernorm` is a `RMSNorm`, to which no adapter can be added\n\nhint: `peft.target",
        ),
        (
            {"target_modules": ["output_layer"]},
            "no adapter can be added to `output_layer`\n\nhint: leave it out of `peft.target_modules`",
        ),
        (
            {"exclude_modules": ["linear_*"]},
            "`LoRA` adds no trainable parameter",
        ),
    ],
)
def test_what_cannot_be_is_said_on_every_rank(settings, message, ranks, model_folder):
    changes = {"model__pipeline_model_parallel_size": 2}
    for output, _ in ranks.run(_attach, 2, str(model_folder("gqa")), changes, "LoRA", settings):
        assert output.startswith(message)


def test_parts_need_whole_groups_of_heads(ranks, model_folder):
    changes = {"model__tensor_model_parallel_size": 4, "model__num_query_groups": 2}
    for output, _ in ranks.run(_attach, 4, str(model_folder("gqa")), changes, "LoRA", {"canonical": True}):
        assert output.startswith("`model.num_query_groups` is `2`, which is not divisible by the tensor-parallel size `4`")
    for output, _ in ranks.run(_attach, 4, str(model_folder("gqa")), changes, "LoRA", {}):
        assert output.startswith("LoRA: ")
