"""Settings of megatron-core and Megatron-LM are known by what they do; those that make another model are refused by name."""

from __future__ import annotations

import argparse
import dataclasses
import json
import shutil
import warnings

import pytest
import torch
import yaml
from megatron.core.transformer import MLATransformerConfig, TransformerConfig
from transformers import AutoConfig

from converter import Reporter, UserError, hf_to_mcore, inspect, mcore_to_hf, verify
from converter.megatron_settings import NEUTRAL, Effect, effect_of, find_unsupported
from tests.conftest import GOLDEN
from tests.converter.test_foreign import ARGS
from tests.refusal import refused


@pytest.fixture(scope="module")
def imported(model_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("imported") / "m"
    hf_to_mcore(model_folder("padded_vocab"), folder, integrity=False)
    return folder


@pytest.fixture
def bare(imported, tmp_path):
    """A checkpoint that has no `config.json`, and a `run_config.yaml`."""
    folder = tmp_path / "megatron"
    shutil.copytree(imported, folder)
    shutil.rmtree(folder / "iter_0000000" / "huggingface")
    shutil.rmtree(folder / "iter_0000000" / "tokenizer")
    return folder


def say_in_run_config(folder, **settings):
    path = folder / "iter_0000000" / "run_config.yaml"
    document = yaml.safe_load(path.read_text())
    document["model"] |= settings
    path.write_text(yaml.safe_dump(document))


def say_in_args(folder, **settings):
    """As Megatron-LM does; nothing else is said."""
    (folder / "iter_0000000" / "run_config.yaml").unlink(missing_ok=True)
    args = {name: value for name, value in {**ARGS, **settings}.items() if value is not ...}
    state = {"args": argparse.Namespace(**args), "iteration": 0, "checkpoint_version": 3.0}
    torch.save(state, folder / "iter_0000000" / "common.pt")


@pytest.fixture(scope="module")
def megatron_lm():
    """Every setting of Megatron-LM's command line with its default."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what is not installed, Transformer Engine and a GPU, and of old argparse
        from megatron.training.arguments import add_megatron_arguments

        parser = add_megatron_arguments(argparse.ArgumentParser(allow_abbrev=False))
    return {action.dest: action.default for action in parser._actions if action.dest != "help"}


def test_every_setting_of_megatron_core_is_in_one_table():
    unknown = [field.name for field in dataclasses.fields(MLATransformerConfig) if effect_of(field.name) is Effect.UNKNOWN]
    assert not unknown, "say in `converter.megatron_settings` what these do"


COMPUTED = {
    "activation_func_clamp_value", "apply_residual_connection_post_layernorm", "attention_output_gate",
    "experimental_attention_variant", "glu_linear_offset", "heterogeneous_block_specs", "is_hybrid_model",
    "layernorm_zero_centered_gamma", "linear_attention_freq", "mrope_section", "mtp_num_layers", "multi_latent_attention",
    "no_rope_freq", "qk_l2_norm", "rotary_interleaved", "softmax_scale", "softmax_type", "use_mup", "window_attn_skip_freq",
}  # fmt: skip


def test_defaults_of_megatron_core_are_neutral():
    defaults = {field.name: field.default for field in dataclasses.fields(TransformerConfig)}
    assert defaults.keys() & NEUTRAL.keys() == COMPUTED
    assert not list(find_unsupported(defaults, only_model_words=False))


def test_defaults_of_megatron_lm_are_neutral_and_none_of_its_models_settings_is_unknown(megatron_lm):
    assert len(megatron_lm) > 700
    assert not list(find_unsupported(megatron_lm, only_model_words=True))
    on = dict.fromkeys(megatron_lm, "something")
    assert not [setting.name for setting in find_unsupported(on, only_model_words=True) if not setting.known]


def test_a_run_config_of_megatron_bridge_holds_nothing_foreign():
    document = yaml.safe_load((GOLDEN / "bridge_llama_tiny/megatron/iter_0000000/run_config.yaml").read_text())
    assert len(document["model"]) > 250
    assert not list(find_unsupported(document["model"], only_model_words=False))


def test_all_of_megatron_lms_settings_beside_a_llama_pass(bare, tmp_path, megatron_lm, model_folder):
    say_in_args(bare, **{name: value for name, value in megatron_lm.items() if name not in ARGS and plain(value)})
    mcore_to_hf(bare, tmp_path / "back")
    assert verify(model_folder("padded_vocab"), tmp_path / "back").same


def plain(value):
    return value is None or isinstance(value, (bool, int, float, str))


OTHER = {
    "activation_func_clamp_value": 7.0, "apply_layernorm_1p": True, "apply_residual_connection_post_layernorm": True,
    "attention_output_gate": True, "experimental_attention_variant": "dsa", "glu_linear_offset": 1.0,
    "final_logit_softcapping": 30.0, "embedding_multiplier": 12.0, "hybrid_override_pattern": "M*-",
    "layernorm_zero_centered_gamma": True, "linear_attention_freq": 4, "mtp_num_layers": 1, "multi_latent_attention": True,
    "no_rope_freq": [1, 0, 0, 0], "num_experts": 8, "qk_l2_norm": True, "rotary_interleaved": True, "softmax_scale": 0.5,
    "softmax_type": "learnable", "spec": ["my.layers", "spec"], "squared_relu": True, "use_mup": True,
}  # fmt: skip

EXPERTS_IN_ARGS = (say_in_args, "num_experts")
"""Where it is the name of a field that families have."""


@pytest.mark.parametrize(
    ("say", "name"), [(say, name) for say in (say_in_run_config, say_in_args) for name in OTHER if (say, name) != EXPERTS_IN_ARGS]
)
def test_a_setting_that_makes_another_model_is_refused_by_name(bare, tmp_path, say, name):
    say(bare, **{name: OTHER[name]})
    refused(mcore_to_hf, bare, tmp_path, f"(`run_config.yaml`|Megatron-LM's `args`) has `{name}: ")


def test_experts_in_args_are_no_dense_model(bare, tmp_path, model_folder):
    say_in_args(bare, num_experts=8)
    refused(
        mcore_to_hf, bare, tmp_path, "Megatron-LM's `args` describes a model of no supported family .*`num_moe_experts` is `8`"
    )
    dense = model_folder("padded_vocab")
    with pytest.raises(UserError, match=r"`num_moe_experts`.*`None`.*Megatron-LM's `args` that it is `8`"):
        mcore_to_hf(bare, tmp_path / "out", hf_config=dense)


def test_the_refusal_says_the_value_and_what_can_be_exported(bare, tmp_path, model_folder):
    say_in_run_config(bare, layernorm_zero_centered_gamma=True)
    text = (
        "`run_config.yaml` has `layernorm_zero_centered_gamma: True`, which no `config.json` of a supported family can express: "
        "the exported model would compute something else\n\n"
        "hint: a model with `layernorm_zero_centered_gamma` `False` or `None` can be exported; with zero-centered weights 1 "
        "would have to be added to each norm"
    )
    for given in (None, model_folder("padded_vocab")):  # whoever gives a `config.json`
        with pytest.raises(UserError) as error:
            mcore_to_hf(bare, tmp_path / "out", hf_config=given)
        assert str(error.value) == text
    assert inspect(bare).parameters  # looking is no export


@pytest.mark.parametrize("settings", [
    {"softmax_scale": 8**-0.5}, {"no_rope_freq": [0, 0, 0, 0]}, {"mtp_num_layers": 0}, {"softmax_type": "vanilla"},
    {"window_attn_skip_freq": 4}, {"residual_multiplier": 1.0}, {"my_router_buffers": 0}, {"fork_scaling": 1.0},
    {"transformer_layer_spec": {"_call_": False, "_target_": "megatron.bridge.models.gpt_provider.local_layer_spec"}},
    {"_target_": "megatron.bridge.models.llama.llama_provider.Llama3ModelProvider8B"}, {"moe_new_buffer": 64},
    {"spec": ["local"]}, {"spec": ["megatron.core.models.gpt.gpt_layer_specs", "get_gpt_layer_local_spec"]},
    {"embedding_weights_in_fp32": True},
], ids=str)  # fmt: skip
def test_values_that_change_nothing_pass(bare, tmp_path, settings):
    say_in_run_config(bare, **settings)
    mcore_to_hf(bare, tmp_path / "back", dry_run=True)


def test_a_rope_scaled_by_megatron_bridges_provider_is_scaled(bare, tmp_path):
    own = {"scale_factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "old_context_len": 8192, "rope_scaling": False}
    say_in_run_config(bare, _target_="megatron.bridge.models.llama.llama_provider.Llama31ModelProvider8B", **own)
    mcore_to_hf(bare, tmp_path / "back")
    rope = AutoConfig.from_pretrained(tmp_path / "back").rope_parameters
    assert (rope["rope_type"], rope["factor"], rope["original_max_position_embeddings"]) == ("llama3", 8.0, 8192)
    say_in_run_config(bare, low_freq_factor=2.0)
    refused(mcore_to_hf, bare, tmp_path, "`run_config.yaml` has `low_freq_factor: 2.0`, which no `config.json`")


UNKNOWN = [
    {"my_attention": "spiral"}, {"score_function": 3}, {"_target_": "megatron.bridge.models.gemma.GemmaModelProvider"},
    {"transformer_layer_spec": {"_target_": "mine.layers.spec"}},
]  # fmt: skip


@pytest.mark.parametrize("settings", UNKNOWN, ids=str)
def test_an_unknown_setting_is_refused_unless_somebody_says_which_model_it_is(bare, tmp_path, model_folder, settings):
    say_in_run_config(bare, **settings)
    [name] = settings
    refused(mcore_to_hf, bare, tmp_path, rf"has `{name}: .*`, an unknown setting .*\n\nhint: .*`--hf-config DIR`")
    notes = []
    mcore_to_hf(
        bare, tmp_path / "back", hf_config=model_folder("padded_vocab"), reporter=Reporter(note=notes.append), dry_run=True
    )
    assert f"`run_config.yaml` has `{name}`, which is not known here: it is taken not to matter" in notes


def test_unknown_settings_of_a_run_are_none_of_a_models(bare, tmp_path):
    say_in_args(bare, our_cluster="blue", retries=3)
    mcore_to_hf(bare, tmp_path / "back", dry_run=True)
    say_in_args(bare, our_cluster="blue", logit_temperature=3)
    refused(mcore_to_hf, bare, tmp_path, "Megatron-LM's `args` has `logit_temperature: 3`, an unknown setting")


def test_a_window_of_some_layers_alone_is_refused_where_it_has_one(bare, tmp_path):
    say_in_run_config(bare, window_size=[127, 0], window_attn_skip_freq=2)
    refused(mcore_to_hf, bare, tmp_path, "`window_(size|attn_skip_freq)`")
    say_in_run_config(bare, window_size=None, window_attn_skip_freq=2)
    mcore_to_hf(bare, tmp_path / "back", dry_run=True)


FACTS = {
    "rotary_base": (500000, "rope_theta"), "norm_epsilon": (1e-6, "rms_norm_eps"),
    "untie_embeddings_and_output_weights": (False, "tie_word_embeddings"), "use_rope_scaling": (True, "rope_scaling"),
    "rotary_seq_len_interpolation_factor": (2.0, "factor` of `rope_scaling"), "num_query_groups": (2, "num_key_value_heads"),
    "kv_channels": (16, "head_dim"), "num_attention_heads": (16, "num_attention_heads"),
    "window_size": ((15, 0), "sliding_window"),
    "rotary_percent": (0.5, "rotary_percent"), "swiglu": (False, "hidden_act"), "vocab_size": (400, "vocab_size"),
}  # fmt: skip


@pytest.mark.parametrize("name", FACTS)
def test_a_config_that_is_given_must_agree_with_args(bare, tmp_path, model_folder, name):
    value, called = FACTS[name]
    say_in_args(bare, **{name: value})
    refused(
        mcore_to_hf,
        bare,
        tmp_path,
        rf"says that .*`{called}`.* is `.*`, Megatron-LM's `args` that it is `",
        hf_config=model_folder("padded_vocab"),
    )


def test_a_config_that_disagrees_is_refused_with_both_values_and_places(bare, tmp_path, model_folder):
    folder = tmp_path / "given"
    folder.mkdir()
    config = json.loads((model_folder("padded_vocab") / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 1e-6}))
    with pytest.raises(UserError) as error:
        mcore_to_hf(bare, tmp_path / "out", hf_config=folder)
    assert str(error.value) == (
        f"`{folder}`'s `config.json` says that `layernorm_epsilon` (`rms_norm_eps`) is `1e-06`, `run_config.yaml` that it is "
        "`1e-05`: no tensor shows which is right\n\n"
        "hint: the weights were trained with one of them: correct the other, so that both have the same `layernorm_epsilon` "
        "(`rms_norm_eps`)"
    )


def test_a_config_that_is_given_must_agree_with_the_one_that_travelled(imported, tmp_path, model_folder):
    folder, copy = tmp_path / "given", tmp_path / "m"
    folder.mkdir()
    shutil.copytree(imported, copy)
    (copy / "iter_0000000" / "run_config.yaml").unlink()
    config = json.loads((model_folder("padded_vocab") / "config.json").read_text())
    heads = {"num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 4}
    (folder / "config.json").write_text(json.dumps({**config, **heads}))
    pattern = r"`num_attention_heads` is `16`, the checkpoint's own `config.json` that it is `8`"
    refused(mcore_to_hf, copy, tmp_path, pattern, hf_config=folder)
    (folder / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 4096, "attention_dropout": 0.1}))
    mcore_to_hf(copy, tmp_path / "back", hf_config=folder)  # longer contexts, and how it is trained, are not the weights' matter


def test_the_config_that_travelled_must_agree_with_the_run_config(imported, tmp_path):
    folder = tmp_path / "m"
    shutil.copytree(imported, folder)
    say_in_run_config(folder, rotary_base=500000.0)
    refused(
        mcore_to_hf, folder, tmp_path, r"`rotary_base` \(`rope_theta`\) is `10000.0`, `run_config.yaml` that it is `500000.0`"
    )


def test_a_run_config_must_agree_with_args(bare, tmp_path):
    text = (bare / "iter_0000000" / "run_config.yaml").read_text()
    say_in_args(bare, rotary_base=500000)
    (bare / "iter_0000000" / "run_config.yaml").write_text(text)
    pattern = r"`config.json`, rebuilt from `run_config.yaml`, says that `rotary_base` .* `10000.0`, Megatron-LM's `args` that"
    refused(mcore_to_hf, bare, tmp_path, pattern)


def test_what_args_leave_out_is_megatrons_default_and_not_transformers(bare, tmp_path):
    say_in_args(bare, norm_epsilon=..., kv_channels=None, num_query_groups=4)
    mcore_to_hf(bare, tmp_path / "back")
    config = json.loads((tmp_path / "back" / "config.json").read_text())
    assert (config["rms_norm_eps"], config["head_dim"], config["num_key_value_heads"]) == (1e-5, 8, 4)


def test_a_padded_vocabulary_is_not_taken_for_the_real_one(bare, tmp_path, model_folder):
    say_in_args(bare, vocab_size=None)
    with pytest.raises(UserError) as error:
        mcore_to_hf(bare, tmp_path / "out")
    assert str(error.value) == (
        "Megatron-LM's `args` say `padded_vocab_size` `512`, and not how many of these rows are tokens\n\n"
        "hint: padding must not become tokens: give a folder with the model's `config.json`, whose `vocab_size` is without "
        "padding: `--hf-config DIR`"
    )
    mcore_to_hf(bare, tmp_path / "back", hf_config=model_folder("padded_vocab"))
    assert verify(model_folder("padded_vocab"), tmp_path / "back").same
    assert verify(model_folder("padded_vocab"), bare).same  # the other side says it


def test_rows_that_are_more_than_padding_are_told_of(bare, tmp_path, model_folder):
    notes = []
    say_in_args(bare, vocab_size=None, make_vocab_size_divisible_by=64, tensor_model_parallel_size=1)
    mcore_to_hf(bare, tmp_path / "b", hf_config=model_folder("padded_vocab"), reporter=Reporter(note=notes.append), dry_run=True)
    assert notes[0].startswith("Megatron-LM's `args` pad 389 tokens to 448 rows, but the embedding has 512: those after 389 are")
    say_in_args(bare, vocab_size=None, make_vocab_size_divisible_by=128, tensor_model_parallel_size=2)
    mcore_to_hf(bare, tmp_path / "b", hf_config=model_folder("padded_vocab"), reporter=Reporter(note=notes.append), dry_run=True)
    assert len(notes) == 1


def test_a_tokenizer_of_as_many_tokens_as_there_are_rows_needs_no_rule(bare, tmp_path):
    write_tokenizer(bare / "iter_0000000" / "tokenizer", 512)
    say_in_args(bare, vocab_size=None, make_vocab_size_divisible_by=384)
    mcore_to_hf(bare, tmp_path / "back")
    assert json.loads((tmp_path / "back" / "config.json").read_text())["vocab_size"] == 512


def test_a_tokenizer_that_may_have_one_token_more_does_not_say_the_vocabulary(bare, tmp_path, model_folder):
    say_in_args(bare, tokenizer_type="NullTokenizer", vocab_size=388)  # "before EOD", in most versions
    refused(mcore_to_hf, bare, tmp_path, "`padded_vocab_size` `512`, and not how many of these rows are tokens")
    mcore_to_hf(bare, tmp_path / "back", hf_config=model_folder("padded_vocab"))
    assert verify(model_folder("padded_vocab"), tmp_path / "back").same


def test_a_vocabulary_that_nobody_padded_is_the_real_one(bare, tmp_path):
    say_in_args(bare, vocab_size=None, make_vocab_size_divisible_by=1, tensor_model_parallel_size=1)
    mcore_to_hf(bare, tmp_path / "back")
    assert json.loads((tmp_path / "back" / "config.json").read_text())["vocab_size"] == 512


def write_tokenizer(folder, size):
    folder.mkdir()
    vocab = {f"t{number}": number for number in range(size - 1)}
    document = {"model": {"type": "BPE", "vocab": vocab}, "added_tokens": [{"id": size - 1, "content": "<s>"}]}
    (folder / "tokenizer.json").write_text(json.dumps(document))


def test_a_tokenizer_tells_how_many_rows_are_tokens_where_the_padding_fits(bare, tmp_path, model_folder):
    write_tokenizer(bare / "iter_0000000" / "tokenizer", 389)
    say_in_args(bare, vocab_size=None)
    notes = []
    mcore_to_hf(bare, tmp_path / "back", reporter=Reporter(note=notes.append))
    assert verify(model_folder("padded_vocab"), tmp_path / "back").same
    assert notes[0] == ("`vocab_size` is 389, as `tokenizer.json` says: Megatron-LM's `args` know only the padded size, 512")
    say_in_args(bare, vocab_size=None, make_vocab_size_divisible_by=64)
    refused(mcore_to_hf, bare, tmp_path, "the tokenizer's 389 tokens, padded to a multiple of 64, would be 448")
