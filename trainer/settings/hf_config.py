"""Does a provider's `config.json` still say what the provider is? Fields of the provider are what is trained; `hf_config`
follows them, so that checkpoints are exported as what they are.

Knows the correspondence of the two from `converter`. Refuses to change the provider.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from converter import megatron_settings
from converter.config import rope_numbers, to_huggingface, to_megatron
from converter.families import find
from formats.errors import UserError, format_untrusted
from trainer.settings.defaults import Choice
from trainer.settings.values import UnnamedError, plain

_ROPE = "rope_scaling"
_OF_INITIALIZATION = {"init_method_std"}
_OF_POSITIONS = {
    "layernorm_epsilon", "rope_scaling", "rope_scaling_factor", "rotary_base", "seq_len_interpolation_factor", "seq_length",
    "window_size",
}  # fmt: skip
"""What people change on purpose in weights that they have, as to make contexts longer."""

_OF_TRAINING = {"attention_dropout", "hidden_dropout"}
"""Fields that say how a model is trained, and not what it is."""


def follow(provider: Any) -> list[Choice]:
    """Bring `hf_config` in line with a provider's fields; answers what changed. UserError where the family has no such model."""
    config = getattr(provider, "hf_config", None)
    if not config:
        return []
    fields, (said, is_now) = find(config.get("model_type")).CONFIG, _both(provider, config)
    if said == is_now:
        return []
    try:
        before, after = to_huggingface(fields, said), to_huggingface(fields, is_now)
    except UserError as error:
        raise UserError(
            f"a `{config['model_type']}` cannot be such a model: {error.args[0]}",
            hint="`~model.hf_config` trains it all the same; its checkpoints cannot be exported to Hugging Face",
        ) from error
    changes = {name: value for name, value in after.items() if value != before.get(name)}
    if _ROPE in changes or "rope_theta" in changes:
        changes |= _rope(config, changes)
        config.pop("rope_parameters", None)
    config.update(changes)
    return [Choice(f"model.hf_config.{name}", value, "as the model's own fields") for name, value in changes.items()]


def check(provider: Any) -> None:
    """UserError where somebody changed `hf_config` alone, which changes no model."""
    config = getattr(provider, "hf_config", None)
    if not config:
        return
    said, is_now = _both(provider, config)
    for name, value in said.items():
        if value != is_now[name]:
            raise UserError(
                f"`model.hf_config` makes `{name}` `{format_untrusted(value)}`, and `model.{name}` is "
                f"`{format_untrusted(is_now[name])}`",
                hint=f"set `model.{name}`; `model.hf_config` follows it",
            )


def compare(provider: Any, config: Mapping[str, Any], *, source: str) -> list[str]:
    """What a provider has otherwise than the `config.json` of the weights at `source`, in words. UserError where they cannot mean
    the same: shapes agree for 8 heads of 32 and for 4 of 64."""
    said, is_now = _both(provider, config)
    notes: list[str] = []
    for name in (name for name in said if said[name] != is_now[name] and name not in _OF_INITIALIZATION):
        if name not in _OF_POSITIONS:
            raise UserError(
                f"`model.{name}` is `{format_untrusted(is_now[name])}`, and the weights at `{source}` were made with "
                f"`{format_untrusted(said[name])}`",
                hint=f"set `model.{name}={format_untrusted(said[name])}`, or name other weights",
            )
        notes.append(
            f"`model.{name}` is `{format_untrusted(is_now[name])}`; the weights were made with `{format_untrusted(said[name])}`"
        )
    return notes


def unsayable(provider: Any) -> dict[str, Any]:
    """Settings of a provider that change what it computes and that no `config.json` can say: its checkpoints get none."""
    settings = {name: _plain(getattr(provider, name)) for name in _CONTEXT if hasattr(provider, name)}
    return {one.name: one.value for one in megatron_settings.find_unsupported(settings, only_model_words=True) if one.known}


_CONTEXT = (*megatron_settings.NEUTRAL, "window_size", "kv_channels", "hidden_size", "num_attention_heads")


def notes(provider: Any) -> list[str]:
    """What to say at the start of a run whose checkpoints cannot be exported to Hugging Face."""
    return [
        f"`model.{name}` is `{format_untrusted(value)}`, which no `config.json` can say: checkpoints have none, and "
        "`mbconvert mcore-to-hf` "
        "refuses them"
        for name, value in (unsayable(provider).items() if getattr(provider, "hf_config", None) else ())
    ]


def compare_settings(provider: Any, settings: Mapping[str, Any], *, source: str) -> list[str]:
    """What a provider computes otherwise than the weights at `source` were made with, by what no `config.json` says, in words.
    UserError for a setting of theirs that the provider does not have."""
    theirs = {
        _OTHER_NAMES.get(one.name, one.name): one.value
        for one in megatron_settings.find_unsupported(settings, only_model_words=True)
        if one.known
    }
    ours = unsayable(provider)
    for name, value in theirs.items():
        if ours.get(name) != value:
            is_now = _plain(getattr(provider, name, None))
            raise UserError(
                f"`model.{name}` is `{format_untrusted(is_now)}`, and the weights at `{source}` were made with "
                f"`{format_untrusted(value)}`",
                hint=f"set `model.{name}={format_untrusted(value)}`, or name other weights",
            )
    return [
        f"`model.{name}` is `{format_untrusted(value)}`; the weights were made without"
        for name, value in ours.items()
        if name not in theirs
    ]


_OTHER_NAMES = {"apply_layernorm_1p": "layernorm_zero_centered_gamma", "num_experts": "num_moe_experts"}
"""What Megatron-LM's `args` call settings of TransformerConfig."""


def _both(provider: Any, config: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """What `config.json` says in Megatron's fields, and what the provider has there; of fields that both have."""
    derived = to_megatron(find(config.get("model_type")).CONFIG, config)
    if hasattr(provider, "rope_scaling"):  # which a `config.json` is silent on where it has none of them
        derived = {"rope_scaling_factor": provider.rope_scaling_factor, "seq_len_interpolation_factor": None} | derived
    said = {name: value for name, value in derived.items() if hasattr(provider, name) and name not in _OF_TRAINING}
    return said, {name: _plain(getattr(provider, name)) for name in said}


def _plain(value: Any) -> Any:
    try:
        return plain(value)
    except UnnamedError:
        return value


def _rope(config: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """The numbers of a scaling that megatron-core has no fields for stay as they were."""
    old = rope_numbers(config)
    theta = changes.get("rope_theta", old.pop("rope_theta"))
    new = changes[_ROPE] if _ROPE in changes else old if old["rope_type"] != "default" else None
    kept = (
        {name: value for name, value in old.items() if name != "rope_theta"}
        if new and new["rope_type"] == old["rope_type"]
        else {}
    )
    return {"rope_theta": theta, _ROPE: new and {**new, **kept, "factor": new["factor"]}}
