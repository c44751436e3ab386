"""A model in the layout `hybrid` is the same model: losses, resumed runs, exports, generated text, estimates."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from converter import adapter_to_hf, mcore_to_hf
from formats.errors import UserError
from tests import models
from tests.converter.family_suite import small_config, small_model
from tests.trainer import small, test_generation, test_parity, witness
from tests.trainer.test_family_training import END, loss_in_peft, saved
from trainer.peft import LoRA

FEW, STOPPED = 6, 3
LAYOUTS = {
    "tp1": (1, {}),
    "tp2": (2, {"model__tensor_model_parallel_size": 2}),
    "pp2": (2, {"model__pipeline_model_parallel_size": 2}),
}
OTHERS = {
    "vpp2": (2, {"model__pipeline_model_parallel_size": 2, "model__virtual_pipeline_model_parallel_size": 2}),
    "uneven": (2, {"model__pipeline_model_parallel_size": 2, "model__num_layers_in_first_pipeline_stage": 1}),
}
DISTRIBUTED = {"dp2_distributed": (2, {"ddp__use_distributed_optimizer": True})}
SHORT = {"train__train_iters": FEW, "scheduler__lr_decay_iters": small.STEPS}
HYBRID = {"model__layout": "hybrid"}


@pytest.fixture(scope="module", params=["llama", "qwen3_moe", pytest.param("mixtral", marks=pytest.mark.slow)])
def folder(request, tmp_path_factory):
    return saved(small_model(request.param, dtype="float32"), tmp_path_factory.mktemp(request.param) / "hf")


@pytest.fixture(scope="module")
def alone(folder, ranks):
    """A run in the layout `gpt`, on one rank."""
    return ranks.run(witness.train, 1, str(folder), SHORT)[0]


@pytest.mark.parametrize("layout", [*LAYOUTS, *(pytest.param(name, marks=pytest.mark.slow) for name in OTHERS)])
def test_losses_are_those_of_the_layout_gpt(layout, folder, alone, ranks):
    world, changes = {**LAYOUTS, **OTHERS}[layout]
    for history in ranks.run(small.train, world, str(folder), {**SHORT, **HYBRID, **changes}):
        assert history.losses == pytest.approx(alone.losses, abs=1e-5)
        assert history.grad_norms == pytest.approx(alone.grad_norms, rel=1e-4)
        assert history.layers == [pytest.approx(layers, abs=1e-5) for layers in alone.layers]
    assert alone.losses[-1] != alone.losses[0]


@pytest.mark.parametrize("variant", ["rope31", "rope_other_numbers", "tied", "both_biases"])
def test_arguments_that_hybrid_model_lacks_are_carried_out_too(variant, ranks, model_folder):
    losses, _ = test_parity._reference(model_folder(variant), 2)
    (history,) = ranks.run(small.train, 1, str(model_folder(variant)), {**SHORT, **HYBRID, "train__train_iters": 2})
    assert history.losses == pytest.approx(losses, abs=test_parity.TOLERANCE)


@pytest.mark.parametrize("layouts", ["gpt, hybrid", "hybrid, gpt"])
@pytest.mark.parametrize("layout", ["tp1", "pp2", "dp2_distributed"])
def test_a_run_goes_on_in_the_other_layout(layout, layouts, folder, alone, ranks, tmp_path):  # noqa: PLR0917 - fixtures
    (before, after), (world, changes) = layouts.split(", "), {**LAYOUTS, **DISTRIBUTED}[layout]
    settings = {**SHORT, **changes, "checkpoint__save": str(tmp_path), "checkpoint__load": str(tmp_path)}
    ranks.run(small.train, world, str(folder), {**settings, "model__layout": before, "train__exit_interval": STOPPED})
    for history in ranks.run(small.train, world, str(folder), {**settings, "model__layout": after}):
        assert history.losses == pytest.approx(alone.losses[STOPPED:], abs=1e-5)
        assert history.grad_norms == pytest.approx(alone.grad_norms[STOPPED:], rel=1e-4)


NETS = ["qwen3_next", "qwen3_5_text"]


@pytest.fixture(scope="module", params=NETS)
def nets(request, tmp_path_factory):
    """A model with gated delta nets."""
    return saved(small_model(request.param, dtype="float32"), tmp_path_factory.mktemp(request.param) / "hf")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_gated_delta_nets_are_trained_in_either_layout_and_go_on_in_the_other(layout, nets, ranks, tmp_path):
    world, changes = LAYOUTS[layout]
    whole, *_ = ranks.run(witness.train, world, str(nets), {**SHORT, **changes})
    settings = {**SHORT, **changes, "checkpoint__save": str(tmp_path), "checkpoint__load": str(tmp_path)}
    stopped = ranks.run(small.train, world, str(nets), {**settings, **HYBRID, "train__exit_interval": STOPPED})
    for first, last in zip(stopped, ranks.run(small.train, world, str(nets), settings), strict=True):
        assert [*first.losses, *last.losses] == pytest.approx(whole.losses, abs=1e-5)
        assert [*first.grad_norms, *last.grad_norms] == pytest.approx(whole.grad_norms, rel=1e-4)
    for history in ranks.run(small.train, world, str(nets), {**SHORT, **changes, **HYBRID}):
        assert history.losses == pytest.approx(whole.losses, abs=1e-5)
    assert whole.losses[-1] != whole.losses[0]


def test_what_is_saved_is_exported_and_trained_on_in_either_layout(folder, ranks, tmp_path):
    still = {**SHORT, "train__train_iters": 1, "optimizer__lr": 0.0, "optimizer__min_lr": 0.0, "scheduler__lr_warmup_iters": 0}
    saves = {"checkpoint__save": str(tmp_path / "run"), **LAYOUTS["pp2"][1], **HYBRID}
    first = ranks.run(small.train, 2, str(folder), {**still, **saves})[-1].losses
    mcore_to_hf(tmp_path / "run", tmp_path / "back")
    assert models.model_tree(tmp_path / "back") == models.model_tree(folder)
    for layout in ("gpt", "hybrid"):
        changes = {**still, "checkpoint__pretrained_checkpoint": str(tmp_path / "run"), "model__layout": layout}
        assert ranks.run(small.train, 1, str(folder), changes)[0].losses == pytest.approx(first, abs=1e-5)
    generated = ranks.run(test_generation.answers, 1, str(tmp_path / "run"), ("model.layout=hybrid",))[-1]
    expected = [[token for token in row if token != END] for row in test_generation.transformers_tokens(folder)]
    assert test_generation.tokens(generated) == expected


def test_adapters_are_in_peft_what_they_are_here(folder, ranks, tmp_path):
    changes = {**SHORT, **LAYOUTS["tp2"][1], **HYBRID, "peft": LoRA(dim=4, alpha=8)}
    whole, *_ = ranks.run(small.train, 2, str(folder), changes)
    settings = {**changes, "checkpoint__save": str(tmp_path / "run"), "checkpoint__load": str(tmp_path / "run")}
    ranks.run(small.train, 2, str(folder), {**settings, "train__exit_interval": STOPPED})
    adapter_to_hf(tmp_path / "run", tmp_path / "adapter")
    assert loss_in_peft(folder, tmp_path / "adapter", STOPPED) == pytest.approx(whole.losses[STOPPED], abs=1e-5)
    assert ranks.run(test_generation.answers, 1, str(tmp_path / "run"))[-1]
    with pytest.raises(UserError, match=r"has adapters of the layout `hybrid`, and `model.layout` is `gpt`"):
        ranks.run(small.train, 2, str(folder), {**settings, "model__layout": "gpt"})
    resumed, *_ = ranks.run(small.train, 2, str(folder), settings)
    assert resumed.losses == whole.losses[STOPPED:]


def test_what_is_not_stored_by_weights_is_not_resumed_in_the_other_layout(ranks, model_folder, tmp_path):
    stored = {"ddp__use_distributed_optimizer": True, "checkpoint__optim_sharding": "dp_reshardable"}
    settings = {**SHORT, **stored, "checkpoint__save": str(tmp_path), "checkpoint__load": str(tmp_path)}
    ranks.run(small.train, 1, str(model_folder("gqa")), {**settings, "train__exit_interval": 1})
    with pytest.raises(UserError) as error:
        ranks.run(small.train, 1, str(model_folder("gqa")), {**settings, **HYBRID})
    assert error.value.args[0] == (
        f"`{tmp_path}/iter_0000001` was saved in the layout `gpt`, and `model.layout` is `hybrid`: the optimizer's state is "
        "stored `dp_reshardable`, not by weights"
    )


MAMBA = {
    "layout": "hybrid", "hybrid_layer_pattern": "M*-M", "mamba_num_heads": 8, "mamba_head_dim": 8, "mamba_num_groups": 2,
}  # fmt: skip
REFUSED = {
    "`model.parallel_residual` is `one_norm`, and `model.layout` is `hybrid`": {
        "layout": "hybrid", "parallel_residual": "one_norm",
    },
    "`model.mtp_num_layers` is `1`, and `model.layout` is `hybrid`": {"layout": "hybrid", "mtp_num_layers": 1},
    "`model.hybrid_layer_pattern` is `M*-M`, and `model.layout` is `gpt`": {**MAMBA, "layout": "gpt"},
    "`model.hybrid_layer_pattern` is `M*-`, which has `3` layers": {**MAMBA, "hybrid_layer_pattern": "M*-"},
    "`model.hybrid_layer_pattern` is `M*|-M`, with pipeline stages": {**MAMBA, "hybrid_layer_pattern": "M*|-M"},
    "`model.hybrid_layer_pattern` is `M*-M/*-`: layers of multi-token": {**MAMBA, "hybrid_layer_pattern": "M*-M/*-"},
    "`model.hybrid_layer_pattern` is `M*-X`: a layer `X` is not": {**MAMBA, "hybrid_layer_pattern": "M*-X"},
    "`model.hybrid_layer_pattern` is `M*-E`, and `model.num_moe_experts` is `None`": {**MAMBA, "hybrid_layer_pattern": "M*-E"},
    "`model.mamba_num_groups` is `1`, which is not divisible by": {
        **MAMBA, "mamba_num_groups": 1, "tensor_model_parallel_size": 2,
    },
    "`model.hybrid_layer_pattern` has Mamba layers, which were not tried with": {**MAMBA, "context_parallel_size": 2},
    "`model.is_hybrid_model` is `True`, and `model.hybrid_layer_pattern` is `None`": {"is_hybrid_model": True},
}  # fmt: skip


def _run(fields, world=2):
    from tests.trainer.layers.passes import SMALL
    from trainer.config import RunConfig
    from trainer.model import GPTModelProvider
    from trainer.settings.resolve import resolve

    config = RunConfig(model=GPTModelProvider(**{**SMALL, **fields}), mixed_precision="fp32")
    config.dataset.sequence_length, config.optimizer.lr = 24, 1e-3
    config.train.global_batch_size, config.train.micro_batch_size = 2, 1
    return lambda: resolve(config, world_size=world, device="gpu" if "context_parallel_size" in fields else "cpu"), config


@pytest.mark.parametrize("message", REFUSED)
def test_what_a_hybrid_cannot_be_is_refused_by_name(message):
    resolve, _ = _run(REFUSED[message])
    with pytest.raises(UserError) as error:
        resolve()
    assert error.value.args[0].startswith(message)


def test_sparse_attention_is_refused_by_name():
    from trainer.model import from_hf_config
    from trainer.settings import hybrid

    model = from_hf_config(small_config("glm_moe_dsa").to_dict())
    model.layout = "hybrid"
    with pytest.raises(UserError) as error:
        hybrid.check(SimpleNamespace(model=model))
    assert error.value.args[0] == (
        "`model.experimental_attention_variant` is `dsa`, and `model.layout` is `hybrid`, in which sparse attention is not built"
    )


def test_packed_examples_are_refused_by_name():
    resolve, config = _run(MAMBA)
    config.dataset.reset_attention_mask, config.dataset.blend = True, ["text"]
    with pytest.raises(UserError, match="has Mamba layers, whose states go on from one packed example to the next"):
        resolve()


def test_decay_in_fp32_is_saved_with_the_distributed_optimizer_alone(tmp_path):
    resolve, config = _run(MAMBA)
    config.mixed_precision, config.checkpoint.save, config.dataset.blend = "bf16_mixed", str(tmp_path), ["text"]
    with pytest.raises(UserError, match="whose `A_log` and `D` are fp32 beside weights in 16 bits"):
        resolve()


SAME = {
    "dense": {},
    "experts": {"num_moe_experts": 4, "moe_ffn_hidden_size": 16, "moe_layer_freq": [0, 1, 1, 1]},
    "delta nets": {
        "experimental_attention_variant": "gated_delta_net", "linear_attention_freq": [1, 0, 1, 1], "linear_key_head_dim": 8,
        "linear_value_head_dim": 8, "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_conv_kernel_dim": 4,
    },
}  # fmt: skip


@pytest.mark.parametrize("model", SAME)
def test_a_hybrid_has_the_parameters_memory_and_operations_of_the_same_gpt(model):
    from trainer.estimate.flops import flops_of_run
    from trainer.estimate.memory import memory

    stages = {"pipeline_model_parallel_size": 2}
    gpt, hybrid = (_run({"layout": layout, **stages, **SAME[model]})[0]() for layout in ("gpt", "hybrid"))
    assert memory(hybrid.config, 2) == memory(gpt.config, 2)
    for peft in (None, LoRA(target_modules=["*.layers.*.self_attention.*"])):
        gpt.config.peft = hybrid.config.peft = peft
        assert flops_of_run(hybrid.config) == flops_of_run(gpt.config)
