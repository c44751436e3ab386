"""`peft` by name: on the command line, in documents and in Python."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from formats.errors import UserError
from tests.trainer.settings import settings
from trainer.peft import PEFT, DoRA, LoRA
from trainer.settings import overrides, yaml_io
from trainer.settings.resolve import resolve


def _after(*texts):
    config = settings()
    overrides.apply(config, texts)
    return config


def test_a_name_chooses_and_settings_follow():
    method = _after("peft=lora", "peft.dim=16", "peft.target_modules=[linear_qkv]", "peft.canonical=true").peft
    assert method == LoRA(dim=16, target_modules=["linear_qkv"], canonical=True)
    assert _after("peft=lora", "peft.dim=16", "peft=dora").peft == DoRA()
    assert _after("peft=lora", "peft.dim=16", "peft=lora").peft == LoRA(dim=16)
    assert type(_after("peft={name:dora,dim:4}").peft) is DoRA
    assert _after("peft={name:dora,dim:4}", "peft={dropout:0.1}").peft == DoRA(dim=4, dropout=0.1)
    assert (
        _after("peft=lora", "peft=none").peft
        is _after("peft=lora", "~peft").peft
        is _after("peft=lora", "peft=null").peft
        is None
    )


@pytest.mark.parametrize("before", [(), ("peft=lora", "peft.alpha=7"), ("peft=dora",)])
@pytest.mark.parametrize(
    "overrides", [(), ("peft=lora", "peft.dim=16", "peft.lora_plus_ratio=4"), ("peft=dora", "peft.a_init=xavier")]
)
def test_a_dump_gives_an_equal_run(overrides, before):
    config = _after(*overrides)
    other = _after(*before)
    assert yaml_io.apply(other, yaml_io.load(yaml_io.dump(config))) == []
    assert other.peft == config.peft
    assert type(other.peft) is type(config.peft)


def test_documents_choose_too_and_say_nothing_with_null():
    config = settings()
    yaml_io.apply(config, yaml_io.load("peft: lora"))
    assert config.peft == LoRA()
    yaml_io.apply(config, yaml_io.load("peft:\n  name: dora\n  dim: 8\n"))
    assert config.peft == DoRA(dim=8)
    ignored = yaml_io.apply(config, yaml_io.load("peft:\n  _target_: megatron.bridge.peft.dora.DoRA\n  alpha: 64\n"))
    assert (config.peft, ignored) == (DoRA(dim=8, alpha=64), ["peft._target_"])
    yaml_io.apply(config, yaml_io.load("peft: null"))
    assert config.peft == DoRA(dim=8, alpha=64)


@dataclass(kw_only=True)
class Own(PEFT):
    """A method of one's own."""

    width: int = 3


def test_a_method_of_ones_own_has_settings_and_is_named_as_set_in_code():
    config = settings()
    config.peft = Own()
    overrides.apply(config, ["peft.width=5"])
    text = yaml_io.dump(config)
    assert "# `peft` is set in Python code" in text
    again = settings()
    again.peft = Own()
    yaml_io.apply(again, yaml_io.load(text))
    assert again.peft == Own(width=5)


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (["peft=lroa"], "`peft` is `lroa`, it should be `lora`, `dora` or `none`\n\nhint: did you mean `lora`?"),
        (["peft=3"], "`peft` is `3`, it should be `lora`, `dora` or `none`\n\nhint: a method of your own is set in Python code"),
        (["peft.dim=3"], "`peft` is `None`, there is no `dim` in it\n\nhint: choose first: `peft=lora` or `peft=dora`"),
        (["peft={dim:3}"], "`peft` is not chosen, there is no `peft.dim`\n\nhint: add `name`: `lora` or `dora`"),
        (["peft=lora", "peft.dmi=3"], "unknown setting `peft.dmi`\n\nhint: did you mean `peft.dim`?"),
        (["peft=lora", "peft.dim=wide"], "`peft.dim` is `wide`, it should be a whole number"),
        (["peft=lora", "peft.a_init=ones"], "`peft.a_init` is `ones`, it should be `kaiming` or `xavier` or `normal`"),
    ],
)
def test_what_cannot_be_chosen_is_said(texts, message):
    with pytest.raises(UserError) as caught:
        _after(*texts)
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("peft", "message"),
    [
        (LoRA(dim=0), "`peft.dim` is `0`, it should be at least 1"),
        (LoRA(dropout=1.0), "`peft.dropout` is `1.0`, it should be at least 0 and less than 1"),
        (DoRA(lora_plus_ratio=0.0), "`peft.lora_plus_ratio` is `0.0`, it should be more than 0"),
        ("lora", "`peft` is a `str`, which has no `transform`"),
    ],
)
def test_numbers_out_of_range_are_found_before_the_start(peft, message):
    config = settings()
    config.peft = peft
    with pytest.raises(UserError) as caught:
        resolve(config, world_size=1, device="cpu")
    assert caught.value.args[0] == message


def test_adapters_that_could_not_be_exported_are_found_before_the_start():
    """PEFT has one adapter for Phi-3's `qkv_proj`."""
    from tests.converter.family_suite import small_model
    from trainer.model import from_hf_config

    config = settings()
    config.model = from_hf_config(small_model("phi3").config.to_dict())
    config.peft, config.dataset.sequence_length = LoRA(canonical=True), 64
    with pytest.raises(UserError, match=r"`peft.canonical` makes several adapters of `.*linear_qkv`") as caught:
        resolve(config, world_size=1, device="cpu")
    assert caught.value.hint == "set `peft.canonical=false`"
