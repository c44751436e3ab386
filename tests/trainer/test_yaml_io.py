"""Documents: a run as YAML, and back."""

from __future__ import annotations

from dataclasses import fields

import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from formats.errors import UserError
from trainer import recipes
from trainer.config import RunConfig
from trainer.settings import overrides, yaml_io

OF_TRAIN = (
    "settings of `train` are: train_iters, num_epochs, global_batch_size, micro_batch_size, exit_interval, "
    "exit_duration_in_mins, manual_gc_interval"
)


def tiny() -> RunConfig:
    return recipes.find("llama_tiny").pretrain_config()


def refusal(text: str) -> str:
    with pytest.raises(UserError) as refused:
        yaml_io.apply(tiny(), yaml_io.load(text, source="run.yaml"))
    return str(refused.value)


@pytest.mark.parametrize("name", recipes.every())
def test_a_dumped_run_loads_as_an_equal_one(name: str) -> None:
    config = recipes.find(name).pretrain_config()
    again = recipes.find("moonlight_16b_a3b" if config.model.multi_latent_attention else "llama_tiny").pretrain_config()
    assert yaml_io.apply(again, yaml_io.load(yaml_io.dump(config))) == []
    assert again == config


def test_a_document_says_every_setting_sorted_within_its_section() -> None:
    config = tiny()
    document = yaml.safe_load(yaml_io.dump(config))
    assert list(document) == [field.name for field in fields(config)]
    assert list(document["train"]) == sorted(field.name for field in fields(config.train))
    assert set(document["optimizer"]) == {field.name for field in fields(config.optimizer)}


TEXT = st.text(st.characters(codec="utf-8", exclude_categories=["Cs", "Cc"]), max_size=20)
# fmt: off
PLAIN = st.recursive(st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | TEXT,
                     lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3), max_leaves=6)
# fmt: on


@settings(max_examples=30, deadline=None, derandomize=True)
@given(
    st.fixed_dictionaries(
        {},
        optional={
            "train": st.fixed_dictionaries({}, optional={"train_iters": st.integers(),
                                           "exit_duration_in_mins": st.none() | st.floats(allow_nan=False)}),
            "checkpoint": st.fixed_dictionaries({}, optional={"save": st.none() | TEXT, "async_save": st.booleans()}),
            "dataset": st.fixed_dictionaries({}, optional={"blend": st.none() | st.lists(PLAIN, max_size=4), "split": TEXT}),
            "model": st.fixed_dictionaries(
                {},
                optional={
                    "hf_config": st.dictionaries(TEXT, PLAIN, max_size=4),
                    "params_dtype": st.sampled_from(["bf16", "torch.float16", "float8_e4m3fn"]),
                    "attention_backend": st.sampled_from(["flash", "local"]),
                    "window_size": st.none() | st.tuples(st.integers(), st.integers()),
                    "moe_layer_freq": st.integers() | st.lists(st.integers(), max_size=3),
                    "activation_func": st.sampled_from(["gelu", "squared_relu"]),
                },
            ),
        },
    )
)  # fmt: skip
def test_any_setting_survives_a_dump(document: dict) -> None:
    config, again = tiny(), tiny()
    yaml_io.apply(config, document)
    yaml_io.apply(again, yaml_io.load(yaml_io.dump(config)))
    assert again == config


@pytest.mark.parametrize("text", ["~model.hf_config.vocab_size", "+model.hf_config.a.b=[1,{c:null}]", "~optimizer", "rng.seed=4"])
def test_an_override_survives_a_dump(text: str) -> None:
    config, again = tiny(), tiny()
    overrides.apply(config, [text])
    yaml_io.apply(again, yaml_io.load(yaml_io.dump(config)))
    assert again == config


def test_a_finalized_model_says_what_only_code_can_set() -> None:
    config, again = tiny(), tiny()
    config.model.apply_rope_fusion = False  # needs Transformer Engine
    config.model.finalize()
    text = yaml_io.dump(config)
    assert text.endswith(
        "# `model.embedding_init_method` is set in Python code\n"
        "# `model.init_method` is set in Python code\n"
        "# `model.output_layer_init_method` is set in Python code\n"
    )
    yaml_io.apply(again, yaml_io.load(text))
    again.model.finalize()
    assert yaml_io.as_mapping(again) == yaml_io.as_mapping(config)


def test_a_pipeline_layout_is_written_as_it_was_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "0")
    config = tiny()
    overrides.apply(
        config,
        [
            "model.pipeline_model_parallel_layout='Et*2|t*2L'",
            "model.pipeline_model_parallel_size=2",
            "model.pipeline_dtype=fp32",
            "model.apply_rope_fusion=false",
        ],
    )
    config.model.finalize()
    assert yaml.safe_load(yaml_io.dump(config))["model"]["pipeline_model_parallel_layout"] == "Et*2|t*2L"


def test_an_empty_section_and_an_empty_document_say_nothing() -> None:
    config = tiny()
    yaml_io.apply(config, yaml_io.load("model:\ntrain: null\noptimizer: {}\n"))
    yaml_io.apply(config, yaml_io.load("# nothing\n"))
    assert config == tiny()


def test_numbers_that_yaml_takes_for_text_are_numbers() -> None:
    config = tiny()
    assert yaml.safe_load("3e-4") == "3e-4"
    yaml_io.apply(config, yaml_io.load("optimizer:\n  lr: 3e-4\ntrain:\n  train_iters: '12'\n"))
    assert (config.optimizer.lr, config.train.train_iters) == (3e-4, 12)


def test_what_megatron_bridge_writes_is_read_without_following_classes() -> None:
    config = tiny()
    text = """
_target_: megatron.bridge.training.config.ConfigContainer
model:
  _target_: megatron.bridge.models.gpt_provider.GPTModelProvider
  activation_func: {_call_: false, _target_: torch.nn.functional.gelu}
  params_dtype: {_call_: false, _target_: torch.bfloat16}
ddp: null
"""
    assert yaml_io.apply(config, yaml_io.load(text)) == ["_target_", "model._target_"]
    assert config.model.activation_func is torch.nn.functional.gelu
    assert config.model.params_dtype is torch.bfloat16


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("train: {train_itres: 1}", "unknown setting `train.train_itres`\n\nhint: did you mean `train.train_iters`?"),
        ("train: {1: 1}", "unknown setting `train.1`\n\nhint: " + OF_TRAIN),
        ("train: 5", "`train` is a section, it cannot be `5`\n\nhint: " + OF_TRAIN),
        ("train:\n  train_iters: 1\n  train_iters: 2\n", "`run.yaml` is not readable: line 3: duplicate key `train_iters`"),
        ("train: &a {train_iters: 1}\nmodel: *a\n", ("`run.yaml` is not readable: line 2 has an alias or a merge key; "
         "write the values out")),
        ("train: {<<: {train_iters: 1}}", ("`run.yaml` is not readable: line 1 has an alias or a merge key; "
         "write the values out")),
        ("[" * 70, "`run.yaml` is not readable: it is nested deeper than 64 levels"),
        ("train: !!python/name:os.system {}", ("`run.yaml` is not readable: line 1, column 8 has a tag or a key that no setting "
         "has")),
        ("train:\n  a: [1\n", "`run.yaml` is not readable: the fault is at line 3, column 1"),
        ("[" * 100_000, "`run.yaml` is not readable: it is nested deeper than 64 levels"),
        ("train: \x07", "`run.yaml` is not readable: the fault is at character 8"),
        ("5", "`run.yaml` is `5`, it should be sections with settings\n\nhint: start with `train:`"),
        ("logger: {wandb_project: 5}", "`logger.wandb_project` is `5`, it should be text or null\n\nhint: write it in quotes"),
        ("logger: {wandb_mode: off}", "`logger.wandb_mode` is `False`, it should be `online` or `offline`"),
    ],
)  # fmt: skip
def test_a_document_that_is_wrong_says_where(text: str, expected: str) -> None:
    hint = "\n\nhint: it should be YAML: `section:`, then `  name: value`"
    assert refusal(text) == expected + (hint if "not readable" in expected else "")
