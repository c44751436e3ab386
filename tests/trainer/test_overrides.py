"""Overrides, against Hydra's own compose."""

from __future__ import annotations

import enum
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from hydra import compose, initialize
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException
from hypothesis import given, settings
from hypothesis import strategies as st
from megatron.core.transformer.enums import AttnBackend
from omegaconf import OmegaConf

from formats.errors import UserError
from trainer import recipes
from trainer.config import FinetuningDatasetConfig, RunConfig
from trainer.model import GPTModelProvider
from trainer.peft import LoRA
from trainer.settings import overrides, yaml_io
from trainer.settings.fields import ALIASES, every_name

OF_TRAIN = (
    "settings of `train` are: train_iters, num_epochs, global_batch_size, micro_batch_size, exit_interval, "
    "exit_duration_in_mins, manual_gc_interval"
)


@pytest.fixture
def config() -> RunConfig:
    return recipes.find("llama_tiny").pretrain_config()


@pytest.fixture(scope="module")
def hydra() -> Iterator[None]:
    with initialize(config_path=None, version_base=None):
        yield
    GlobalHydra.instance().clear()


def as_hydra_has_it(config: Any, *texts: str) -> Any:
    ConfigStore.instance().store(name="run", node=yaml_io.as_mapping(config)[0])
    return OmegaConf.to_container(compose("run", overrides=list(texts)))


def refusal(config: Any, *texts: str) -> str:
    with pytest.raises(UserError) as refused:
        overrides.apply(config, texts)
    return str(refused.value)


ACCEPTED = [
    "train.train_iters=7",
    "train.train_iters=1_000",
    "optimizer.lr=3e-4",
    "optimizer.clip_grad=1.5",
    "optimizer.lr=null",
    "optimizer.bf16=true",
    "checkpoint.save=/tmp/a-b_c.d/e",
    "checkpoint.save=s3://bucket/run",
    "checkpoint.save='with spaces, commas'",
    'dataset.split="969,30,1"',
    "checkpoint.save=",
    "dataset.blend=[0.3,a_text,0.7,'b text']",
    "dataset.blend_per_split=[[a],null,[1,b]]",
    "scheduler.lr_decay_style=WSD",
    "logger={log_interval:3,wandb_project:p}",
    "mixed_precision=fp32",
    "model.hf_config.vocab_size=5",
    "model.hf_config.architectures=[A,B]",
    "+model.hf_config.quantization={bits: 4, groups: [1, 2]}",
    "+model.hf_config.quantization.method.name=x",
    "++model.hf_config.vocab_size=9",
    "++model.hf_config.new=true",
    "~model.hf_config.vocab_size",
    "~model.hf_config.vocab_size=257",
    "+checkpoint.load=/tmp/there",
    "rng.seed=int('5')",
]


@pytest.mark.parametrize("text", ACCEPTED)
def test_an_override_means_what_it_means_to_hydra(config: RunConfig, hydra: None, text: str) -> None:
    expected = as_hydra_has_it(config, text)
    overrides.apply(config, [text])
    assert yaml_io.as_mapping(config)[0] == expected


def test_later_overrides_win_over_earlier_ones(config: RunConfig, hydra: None) -> None:
    texts = ["train.train_iters=1", "+model.hf_config.a.b=1", "++model.hf_config.a={b:2,c:3}", "train.train_iters=2"]
    expected = as_hydra_has_it(config, *texts)
    overrides.apply(config, texts)
    assert yaml_io.as_mapping(config)[0] == expected


@dataclass
class Inner:
    free: dict[str, Any] = field(default_factory=lambda: {"a": 1, "b": {"a": 2, "c": "x"}, "c": "z"})


@dataclass
class Outer:
    part: Inner = field(default_factory=Inner)


NAMES = st.sampled_from(["a", "b", "c", "d", "b.a", "b.c", "b.d", "b.d.a", "d.a"])
SCALARS = st.sampled_from(["1", "0.5", "x", "'q r'", "true"])
VALUES = SCALARS | st.sampled_from(["{a:1}", "{c:{a:z}}", "{}"])
OVERRIDES = st.builds("{}part.free.{}={}".format, st.sampled_from(["", "++", "~"]), NAMES, VALUES)
ADDING = st.builds("+part.free.{}={}".format, NAMES, SCALARS)
"""Without mappings: where Hydra lets `+a={b:1}` replace the number that is there, this refuses, as for all other values."""


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.lists(OVERRIDES | ADDING, min_size=1, max_size=3))
def test_a_free_mapping_follows_hydra_in_everything(hydra: None, texts: list[str]) -> None:
    config = Outer()
    try:
        expected = as_hydra_has_it(config, *texts)
    except HydraException:
        refusal(config, *texts)
        return
    overrides.apply(config, texts)
    assert yaml_io.as_mapping(config)[0] == expected


def test_an_unknown_key_suggests_the_nearest(config: RunConfig) -> None:
    assert refusal(config, "train.train_itres=1") == (
        "unknown setting `train.train_itres`\n\nhint: did you mean `train.train_iters`?"
    )


def test_an_unknown_section_lists_the_sections(config: RunConfig) -> None:
    assert refusal(config, "trian.train_iters=1") == (
        "unknown section `trian`\n\nhint: did you mean `train`? sections are: model, train, validation, optimizer, scheduler, "
        "dataset, tokenizer, logger, checkpoint, ddp, dist, rng, comm_overlap, profiling, diagnostics"
    )


@pytest.mark.parametrize("text", ["lr=1", "train.lr=1"])
def test_a_setting_of_another_section_is_found_there(config: RunConfig, text: str) -> None:
    assert refusal(config, text).endswith("\n\nhint: did you mean `optimizer.lr`?")


def test_a_key_like_none_lists_those_of_its_section(config: RunConfig) -> None:
    assert refusal(config, "rng.zzz=1") == "unknown setting `rng.zzz`\n\nhint: settings of `rng` are: seed"


def test_adding_does_not_add_fields_to_a_section(config: RunConfig) -> None:
    assert refusal(config, "+train.zzzz=1").startswith("unknown setting `train.zzzz`")


def test_an_unknown_key_of_a_free_mapping_can_be_added(config: RunConfig) -> None:
    assert refusal(config, "model.hf_config.vocab_sise=1") == (
        "there is no `model.hf_config.vocab_sise`\n\nhint: did you mean `vocab_size`? `+model.hf_config.vocab_sise=…` adds it"
    )


def test_adding_what_is_there_is_refused(config: RunConfig) -> None:
    assert refusal(config, "+optimizer.lr=3") == (
        "cannot add `optimizer.lr`: it is there, and is `0.001`\n\n"
        "hint: `optimizer.lr=3` changes it, `++optimizer.lr=3` does both"
    )


def test_removing_brings_the_default_back(config: RunConfig) -> None:
    overrides.apply(config, ["~optimizer.lr=0.001", "~train.train_iters", "~model.hf_config.rope_theta", "~scheduler"])
    assert config.optimizer.lr is None
    assert config.train.train_iters == 100
    assert "rope_theta" not in config.model.hf_config
    assert config.scheduler.lr_warmup_fraction is None


def test_removing_another_value_is_refused(config: RunConfig) -> None:
    assert refusal(config, "~optimizer.lr=5") == (
        "cannot remove `optimizer.lr`: it is `0.001`, not `5`\n\nhint: `~optimizer.lr` removes it whatever it is"
    )


def test_what_has_no_default_cannot_be_removed(config: RunConfig) -> None:
    assert refusal(config, "~model") == "`model` has no default to go back to\n\nhint: set it to what it should be"


@pytest.mark.parametrize("value", ["1,2", "choice(1,2)", "range(1,3)", "interval(1,2)"])
def test_a_sweep_is_refused(config: RunConfig, value: str) -> None:
    assert refusal(config, f"train.train_iters={value}").startswith(
        f"`train.train_iters={value}` is a sweep over several values, and a run has one\n\nhint: "
    )


def test_a_sweep_that_meant_text_or_a_list_says_how(config: RunConfig) -> None:
    assert refusal(config, "dataset.split=969,30,1") == (
        "`dataset.split=969,30,1` is a sweep over several values, and a run has one\n\n"
        "hint: a list is `dataset.split=[969,30,1]`, text with commas `'dataset.split=\"969,30,1\"'`"
    )


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("checkpoint.save=/tmp/münchen 日本/a", "/tmp/münchen 日本/a"),
        ("checkpoint.save=a#b&c;d!e<f>g^h`i", "a#b&c;d!e<f>g^h`i"),
        ("checkpoint.save='~a'", "~a"),
        ("checkpoint.save=./~/a", "./~/a"),
        ('checkpoint.save="é"', "é"),
    ],
)
def test_letters_that_hydras_grammar_lacks_stand_for_themselves(config: RunConfig, text: str, value: str) -> None:
    overrides.apply(config, [text])
    assert config.checkpoint.save == value


def test_letters_that_hydras_grammar_lacks_stand_in_lists_and_mappings_too(config: RunConfig) -> None:
    overrides.apply(config, ["dataset.blend=[0.3,~/a,0.7,'b#,']", "+model.hf_config.x={ä: [~]}"])
    assert config.dataset.blend == [0.3, "~/a", 0.7, "b#,"]
    assert config.model.hf_config["x"] == {"ä": ["~"]}


def test_groups_and_interpolations_are_refused(config: RunConfig) -> None:
    assert refusal(config, "model@a=b") == (
        "`model@a=b` chooses from a config group, and there are none\n\nhint: write `section.name=value`"
    )
    assert refusal(config, "checkpoint.save=${oc.env:HOME}") == (
        "`checkpoint.save=${oc.env:HOME}` has an interpolation, which is not followed\n\nhint: write the value itself"
    )


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("train.train_iters", ": it has no `=`"),
        ("checkpoint.save=a=b", ": `=` has a meaning of its own in Hydra's grammar"),
        ("checkpoint.save=(a)", ": `(` has a meaning of its own in Hydra's grammar"),
        ("checkpoint.save=a\\&b", ""),
    ],
)
def test_what_cannot_be_read_says_how_to_write_it(config: RunConfig, text: str, reason: str) -> None:
    assert refusal(config, text) == (
        f"cannot read the override `{text}`{reason}\n\n"
        "hint: write `section.name=value`; text with special characters goes in quotes: `'section.name=\"a=b\"'`"
    )


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("train.train_iters=x", "`train.train_iters` is `x`, it should be a whole number"),
        ("train.train_iters=1.5", "`train.train_iters` is `1.5`, it should be a whole number"),
        ("train.train_iters=true", "`train.train_iters` is `True`, it should be a whole number"),
        ("train.train_iters=null", "`train.train_iters` is `null`, it should be a whole number"),
        ("optimizer.lr=fast", "`optimizer.lr` is `fast`, it should be a number or null"),
        ("optimizer.bf16=1", "`optimizer.bf16` is `1`, it should be `true` or `false`"),
        ("logger.wandb_project=true", "`logger.wandb_project` is `True`, it should be text or null\n\nhint: write it in quotes"),
        ("dataset.blend=a", "`dataset.blend` is `a`, it should be a list or null"),
        ("dist.device=tpu", "`dist.device` is `tpu`, it should be `auto` or `cpu` or `gpu`"),
        ("model.window_size=[1]",
         "`model.window_size` is `[1]`, it should be a list of 2: a whole number, a whole number or null"),
        ("model.moe_layer_freq=x", "`model.moe_layer_freq` is `x`, it should be a whole number or a list, each a whole number"),
        ("model.attention_backend=flush", ("`model.attention_backend` is `flush`, it should be "
         "`flash` or `fused` or `unfused` or `local` or `auto`")),
        ("model.params_dtype=float33", "`model.params_dtype` is `float33`, it should be a dtype such as `bf16` or `float32`"),
        ("model.activation_func=os.system", ("`model.activation_func` is `os.system`, it should be the name of a function in "
         "`torch.nn.functional`")),
        ("model.init_method=silu",
         "`model.init_method` is `silu`, it should be an object that only Python code can make or null"),
        ("train=3", "`train` is a section, it cannot be `3`\n\nhint: " + OF_TRAIN),
        ("train.train_iters.x=1", ("`train.train_iters` is `100`, there is no `x` in it\n\n"
         "hint: set `train.train_iters` as a whole")),
    ],
)  # fmt: skip
def test_a_value_of_the_wrong_type_says_what_is_expected(config: RunConfig, text: str, expected: str) -> None:
    assert refusal(config, text) == expected


@pytest.mark.parametrize("name", ["bf16", "bfloat16", "torch.bfloat16"])
def test_a_dtype_goes_by_each_of_its_names(config: RunConfig, name: str) -> None:
    overrides.apply(config, [f"model.params_dtype={name}"])
    assert config.model.params_dtype is torch.bfloat16


def test_enums_functions_and_tuples_become_what_megatron_wants(config: RunConfig) -> None:
    overrides.apply(config, ["model.attention_backend=flash", "model.activation_func=gelu", "model.window_size=[7,0]"])
    assert config.model.attention_backend is AttnBackend.flash
    assert config.model.activation_func is torch.nn.functional.gelu
    assert config.model.window_size == (7, 0)


def test_a_number_for_text_stays_as_it_was_written(config: RunConfig) -> None:
    overrides.apply(config, ["logger.wandb_exp_name=1e5", "checkpoint.save=1_000"])
    assert (config.logger.wandb_exp_name, config.checkpoint.save) == ("1e5", "1_000")


def test_a_whole_number_is_a_float_where_one_is_asked_for(config: RunConfig) -> None:
    overrides.apply(config, ["optimizer.lr=1"])
    assert type(config.optimizer.lr) is float


def test_names_of_other_trainers_are_understood(config: RunConfig) -> None:
    overrides.apply(config, ["dataset.seq_length=64", "dataset.data_path=[a]", "model.seq_length=99"])
    assert (config.dataset.sequence_length, config.dataset.blend, config.model.seq_length) == (64, ["a"], 99)


def test_every_name_of_another_trainer_is_no_setting_itself_and_means_one_that_there_is() -> None:
    names = set(every_name(RunConfig(model=GPTModelProvider(), peft=LoRA())))
    assert not ALIASES.keys() & names
    tuned = set(every_name(RunConfig(model=GPTModelProvider(), dataset=FinetuningDatasetConfig())))
    assert set(ALIASES.values()) <= names | tuned


def test_aliases_are_understood_in_files_too(config: RunConfig) -> None:
    yaml_io.apply(config, {"train": {"max_steps": 7, "learning_rate": 1e-4}, "model": {"tp": 2}})
    values = config.train.train_iters, config.optimizer.lr, config.model.tensor_model_parallel_size
    assert values == (7, 1e-4, 2)


class Colour(enum.Enum):
    RED = "r"


@dataclass
class OwnDataset:
    seq_length: int = 8
    colour: Colour | None = None
    extra: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class FrozenDataset:
    size: int = 8


def test_a_dataset_of_ones_own_works_by_its_fields(config: RunConfig) -> None:
    config.dataset = OwnDataset()
    overrides.apply(config, ["dataset.seq_length=64", "dataset.colour=RED", "+dataset.extra.a=1"])
    assert config.dataset == OwnDataset(64, Colour.RED, {"a": 1})
    assert refusal(config, "dataset.colour=BLUE") == "`dataset.colour` is `BLUE`, it should be `RED` or null"


def test_a_frozen_dataset_says_that_it_is(config: RunConfig) -> None:
    config.dataset = FrozenDataset()
    assert refusal(config, "dataset.size=9").startswith("`dataset.size` cannot be set: `FrozenDataset` is a frozen dataclass")


def test_a_dataset_that_is_no_dataclass_has_no_settings(config: RunConfig) -> None:
    config.dataset = object()
    assert refusal(config, "dataset.size=9").startswith("`dataset` is `a object`, there is no `size` in it")
