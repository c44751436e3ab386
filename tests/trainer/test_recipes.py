"""Recipes, against transformers' models on the meta device and megatron-core's own checks."""

from __future__ import annotations

import importlib
import json
import pkgutil
import re
from dataclasses import replace
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoConfig, AutoModelForCausalLM

from converter import families
from converter.rules import Rule
from formats.errors import UserError
from trainer import recipes
from trainer.config import RunConfig
from trainer.estimate.memory import memory
from trainer.settings import yaml_io
from trainer.settings.resolve import resolve

PUBLISHED = {
    "llama3_8b": 8_030_261_248,
    "llama3_70b": 70_553_706_496,
    "llama31_8b": 8_030_261_248,
    "llama31_70b": 70_553_706_496,
    "llama31_405b": 405_853_388_800,
    "llama32_1b": 1_235_814_400,
    "llama32_3b": 3_212_749_824,
    "gemma2_2b": 2_614_341_888,
    "gemma2_9b": 9_241_705_984,
    "gemma2_27b": 27_227_128_320,
    "gemma3_270m": 268_098_176,
    "gemma3_1b": 999_885_952,
    "gemma3_4b": 4_300_079_472 - (416_866_032 + 1152 * 2560 + 1152),
    "gemma3_12b": 12_187_325_040 - (416_866_032 + 1152 * 3840 + 1152),
    "gemma3_27b": 27_432_406_640 - (416_866_032 + 1152 * 5376 + 1152),
    "glm4_9b": 9_400_279_040,
    "glm4_32b": 32_566_081_536,
    "granite3_2b": 2_533_539_840,
    "granite3_8b": 8_170_864_640,
    "mistral_7b": 7_248_023_552,
    "mistral_nemo_12b": 12_247_782_400,
    "mistral_small_24b": 23_572_403_200,
    "olmo2_1b": 1_484_916_736,
    "olmo2_7b": 7_298_617_344,
    "olmo2_13b": 13_716_198_400,
    "olmo2_32b": 32_234_279_936,
    "phi4_14b": 14_659_507_200,
    "phi4_mini": 3_836_021_760,
    "qwen25_0_5b": 494_032_768,
    "qwen25_1_5b": 1_543_714_304,
    "qwen25_3b": 3_085_938_688,
    "qwen25_7b": 7_615_616_512,
    "qwen25_14b": 14_770_033_664,
    "qwen25_32b": 32_763_876_352,
    "qwen25_72b": 72_706_203_648,
    "qwen3_0_6b": 596_049_920,
    "qwen3_1_7b": 1_720_574_976,
    "qwen3_4b": 4_022_468_096,
    "qwen3_8b": 8_190_735_360,
    "qwen3_14b": 14_768_307_200,
    "qwen3_32b": 32_762_123_264,
    "deepseek_v3": 671_026_419_200,
    "glm45_air": 106_852_251_264,
    "deepseek_v2_lite": 15_706_484_224,
    "gptoss_20b": 20_914_757_184,
    "gptoss_120b": 116_829_156_672,
    "mixtral_8x7b": 46_702_792_704,
    "moonlight_16b_a3b": 15_960_110_208,
    "olmoe_1b_7b": 6_919_161_856,
    "qwen3_30b_a3b": 30_532_122_624,
    "qwen3_235b_a22b": 235_093_634_560,
}
"""Parameters that the safetensors on the Hub hold; of Gemma 3, without the vision tower and what projects its output; of
DeepSeek-V3 and GLM-4.5, without layers of multi-token prediction."""


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_recipe_is_the_published_model(name: str) -> None:
    config = AutoConfig.for_model(**recipes.find(name).pretrain_config().model.hf_config)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    recipe = recipes.find(name)
    if "num_nextn_predict_layers" in recipe.model:  # layers that transformers does not build
        recipe = replace(recipe, model=recipe.model | {"num_nextn_predict_layers": 0})
    biases = [buffer for buffer_name, buffer in model.named_buffers() if buffer_name.endswith("e_score_correction_bias")]
    assert sum(tensor.numel() for tensor in (*model.parameters(), *biases)) == PUBLISHED[name] == recipe.parameters


def test_every_recipe_but_a_made_up_one_is_of_a_published_model() -> None:
    assert PUBLISHED.keys() == recipes.every().keys() - {"llama_tiny"}


KINDS = {"pretrain": "gpus", "sft": "sft_gpus", "peft": "peft_gpus"}
"""Of each way to train, the field with the number of GPUs."""


def made(name: str, kind: str) -> tuple[Any, RunConfig, int]:
    """A recipe's function for a way to train, what it makes, and its number of GPUs."""
    recipe = recipes.find(name)
    function = getattr(recipe, f"{kind}_config")
    return function, function(), getattr(recipe, KINDS[kind])


RECOMPUTED = pytest.mark.filterwarnings("ignore:If you are using transformer_engine:UserWarning")
"""megatron-core doubts that attention should be computed again; Gemma 2's should, whose scores are in memory."""


@RECOMPUTED
@pytest.mark.filterwarnings("ignore:Could not determine rank:UserWarning")  # it says what its stages are on the first one
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", recipes.every())
def test_megatron_accepts_a_recipe_and_its_numbers_divide(name: str, kind: str) -> None:
    _, config, gpus = made(name, kind)
    model, gpus = config.model, gpus or 1
    copy = model.tensor_model_parallel_size * model.pipeline_model_parallel_size * model.context_parallel_size
    model.pipeline_dtype, model.apply_rope_fusion = torch.bfloat16, False  # the fusion needs Transformer Engine
    model.finalize()
    assert gpus % copy == 0
    assert config.train.global_batch_size % (config.train.micro_batch_size * gpus // copy) == 0
    assert config.dataset.sequence_length <= model.seq_length


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", recipes.every())
def test_a_recipe_is_data_that_travels(name: str, kind: str) -> None:
    _, config, _ = made(name, kind)
    assert json.loads(json.dumps(config.model.hf_config)) == config.model.hf_config
    assert config.ddp.use_distributed_optimizer == config.optimizer.use_distributed_optimizer
    document = yaml_io.as_mapping(config)[0]
    assert yaml.safe_load(yaml.safe_dump(document)) == document
    if kind == "pretrain":
        assert config.dataset.blend is None
    else:
        assert (config.dataset.path, config.dataset.packed, config.peft is None) == (None, True, kind == "sft")


def machines() -> list[Any]:
    """Each recipe with each way to train. What fine-tunes all parameters on the machine of pretraining is slow: it holds as much,
    and fewer activations. So are adapters of hundreds of experts, of which each rank has others."""

    def slow(name: str, kind: str) -> bool:
        recipe = recipes.find(name)
        counts = ("num_experts", "n_routed_experts", "num_local_experts")
        many = next((recipe.model[count] for count in counts if count in recipe.model), 0)
        return (kind == "sft" and recipe.sft_gpus == recipe.gpus) or (kind == "peft" and many >= 64)

    pairs = ((name, kind) for name in PUBLISHED for kind in KINDS)
    return [pytest.param(name, kind, marks=[pytest.mark.slow] if slow(name, kind) else []) for name, kind in pairs]


@RECOMPUTED
@pytest.mark.parametrize(("name", "kind"), machines())
def test_a_recipe_says_what_one_gpu_holds_and_leaves_a_tenth_of_it_free(name: str, kind: str) -> None:
    function, config, gpus = made(name, kind)
    config.model.cross_entropy_loss_fusion, config.model.cross_entropy_fusion_impl = True, "te"  # as where there are GPUs
    run = resolve(config, world_size=gpus, device="gpu")
    taken = memory(run.config, world_size=gpus).total / 1e9
    (gigabytes,) = re.findall(r": (\d+) GB[.,]", function.__doc__)
    assert abs(taken - int(gigabytes)) < 1.5
    assert taken < 72
    (count,) = re.findall(r"on (\d+|one) GPUs? of 80 GB", function.__doc__)
    assert gpus == (1 if count == "one" else int(count))


def test_the_quickstart_works() -> None:
    from trainer.recipes import llama32_1b

    config = llama32_1b.pretrain_config()
    config.model = llama32_1b.pretrain_config().model
    assert (llama32_1b.name, config.model.num_layers, config.model.rope_scaling_factor) == ("llama32_1b", 16, 32.0)
    assert llama32_1b.summary == "Llama 3.2 1B from random weights, on one GPU of 80 GB or any number."


def test_each_call_makes_a_configuration_of_its_own() -> None:
    first, second = (recipes.find("llama31_8b").pretrain_config() for _ in range(2))
    first.model.hf_config["rope_scaling"]["factor"] = 1.0
    assert second.model.hf_config["rope_scaling"]["factor"] == 8.0


def test_every_recipe_is_importable_by_its_name_once_files_are_imported() -> None:
    files = [module.name for module in pkgutil.iter_modules(recipes.__path__)]
    for file in files:
        importlib.import_module(f"trainer.recipes.{file}")
    for name, recipe in recipes.every().items():
        assert getattr(recipes, name) is recipe


def test_an_unknown_recipe_suggests_the_nearest() -> None:
    with pytest.raises(UserError) as refused:
        recipes.find("llama32_1bb")
    assert str(refused.value) == "there is no recipe `llama32_1bb`\n\nhint: did you mean `llama32_1b`?"
    with pytest.raises(UserError, match="`mbtrain recipes` lists them"):
        recipes.find("gpt")
    with pytest.raises(ImportError):
        from trainer.recipes import gpt  # noqa: F401 # pyright: ignore[reportAttributeAccessIssue]


def test_parameters_are_counted_without_going_through_every_expert(monkeypatch):
    """`mbtrain recipes` counts those of all recipes, each time: DeepSeek V3 alone has 45,000 tensors of experts."""
    asked, shape = [], Rule.shape
    monkeypatch.setattr(Rule, "shape", lambda rule, model: asked.append(rule) or shape(rule, model))
    assert recipes.find("deepseek_v3").parameters > PUBLISHED["deepseek_v3"]  # by the layer of multi-token prediction
    assert 0 < len(asked) <= len(families.find("deepseek_v3").RULES)
