"""Keep a provider's `hf_config`, its `config.json`, in line with its fields, so that checkpoints are exported as what was
trained.

Takes the correspondence of the two from `converter`. Never changes the provider's other fields.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from converter import megatron_settings
from converter.config import TEXT, to_huggingface, to_megatron
from converter.config_hybrid import gpt_fields
from converter.config_rope import rope_numbers
from converter.families import find
from converter.hybrid import PATTERN, without_stages
from formats.errors import UserError, format_untrusted
from trainer.settings.defaults import Default
from trainer.settings.values import NotPlainError, plain

_ROPE = "rope_scaling"
_OF_INITIALIZATION = {"init_method_std"}
_OF_POSITIONS = {
    "layernorm_epsilon", "rope_scaling", "rope_scaling_factor", "rotary_base", "seq_len_interpolation_factor", "seq_length",
    "window_size",
}  # fmt: skip
"""Fields that may differ from those of the weights that a run starts from, for example for a longer context."""

_OF_TRAINING = {"attention_dropout", "hidden_dropout", "moe_aux_loss_coeff"}
"""Fields that affect training and not the architecture."""


def follow(provider: Any) -> list[Default]:
    """Update `hf_config` from a provider's fields. Returns what changed. Raises UserError where the family has no such model."""
    config = getattr(provider, "hf_config", None)
    if not config:
        return []
    fields, (described, actual) = find(config.get("model_type")).CONFIG, _both(provider, config)
    if described == actual:
        return []
    try:
        before, after = to_huggingface(fields, described), to_huggingface(fields, actual)
    except UserError as error:
        raise UserError(
            f"a `{config['model_type']}` cannot be such a model: {error.args[0]}",
            hint="`~model.hf_config` trains it all the same; its checkpoints cannot be exported to Hugging Face",
        ) from error
    changes = {name: value for name, value in after.items() if value != before.get(name)}
    if TEXT in changes:
        text, config[TEXT] = changes.pop(TEXT), dict(config[TEXT])
        of_text = {name: value for name, value in text.items() if value != before[TEXT].get(name)}
        changes |= {f"{TEXT}.{name}": value for name, value in _change(config[TEXT], of_text).items()}
    changed = _change(config, {name: value for name, value in changes.items() if name in after}) | changes
    return [Default(f"model.hf_config.{name}", value, "as the model's own fields") for name, value in changed.items()]


def _change(config: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """Update a `config.json`, or the part that describes its language model. Returns all changes."""
    if _ROPE in changes or "rope_theta" in changes:
        changes = changes | _rope(config, changes)
        config.pop("rope_parameters", None)
    elif "rope_parameters" in changes:
        for name in (_ROPE, "rope_theta"):
            config.pop(name, None)
    config.update(changes)
    return changes


def check(provider: Any) -> None:
    """Raise UserError where `hf_config` alone was changed, which changes no model."""
    config = getattr(provider, "hf_config", None)
    if not config:
        return
    described, actual = _both(provider, config)
    for name, value in described.items():
        if value != actual[name]:
            raise UserError(
                f"`model.hf_config` makes `{name}` `{format_untrusted(value)}`, and `model.{name}` is "
                f"`{format_untrusted(actual[name])}`",
                hint=f"set `model.{name}`; `model.hf_config` follows it",
            )


def compare(provider: Any, config: Mapping[str, Any], *, source: str) -> list[str]:
    """Return notes on how a provider differs from the `config.json` of the weights at `source`.

    Raises UserError for a difference in architecture, which shapes may hide: 8 heads of 32 have the shapes of 4 heads of 64.
    """
    described, actual = _both(provider, config)
    notes: list[str] = []
    for name in (name for name in described if described[name] != actual[name] and name not in _OF_INITIALIZATION):
        if name not in _OF_POSITIONS:
            raise UserError(
                f"`model.{name}` is `{format_untrusted(actual[name])}`, and the weights at `{source}` were made with "
                f"`{format_untrusted(described[name])}`",
                hint=f"set `model.{name}={format_untrusted(described[name])}`, or name other weights",
            )
        notes.append(
            f"`model.{name}` is `{format_untrusted(actual[name])}`; "
            f"the weights were made with `{format_untrusted(described[name])}`"
        )
    return notes


def not_in_hf_config(provider: Any) -> dict[str, Any]:
    """Return the settings of a provider that change what it computes and that its `config.json` does not express: its checkpoints
    get none."""
    config = getattr(provider, "hf_config", None)
    expressed = to_megatron(find(config.get("model_type")).CONFIG, config) if config else {}
    return {name: value for name, value in _unusual(provider).items() if name not in expressed}


def _unusual(provider: Any) -> dict[str, Any]:
    """Return the settings of a provider by which it is not a plain Llama, and for which `config.json` has no common field."""
    settings = {name: _plain(getattr(provider, name)) for name in _CONTEXT if hasattr(provider, name)}
    return {
        setting.name: setting.value
        for setting in megatron_settings.find_unsupported(settings, only_model_words=True)
        if setting.known
    }


_CONTEXT = (*megatron_settings.NEUTRAL, "window_size", "kv_channels", "hidden_size", "num_attention_heads")


def notes(provider: Any) -> list[str]:
    """Return notes for the start of a run whose checkpoints cannot be exported to Hugging Face."""
    return [
        f"`model.{name}` is `{format_untrusted(value)}`, which no `config.json` can say: checkpoints have none, and "
        "`mbconvert mcore-to-hf` "
        "refuses them"
        for name, value in (not_in_hf_config(provider).items() if getattr(provider, "hf_config", None) else ())
    ]


def compare_settings(provider: Any, settings: Mapping[str, Any], *, source: str) -> list[str]:
    """Return notes on settings outside `config.json` in which a provider differs from the weights at `source`.

    Raises UserError for a setting of the weights that the provider does not have.
    """
    settings = _as_counted_here(provider, settings)
    theirs = {
        _OTHER_NAMES.get(setting.name, setting.name): setting.value
        for setting in megatron_settings.find_unsupported(settings, only_model_words=True)
        if setting.known
    }
    of_run, unexpressed = _unusual(provider), not_in_hf_config(provider)
    for name, value in theirs.items():
        if of_run.get(name) != value:
            actual = _plain(getattr(provider, name, None))
            raise UserError(
                f"`model.{name}` is `{format_untrusted(actual)}`, and the weights at `{source}` were made with "
                f"`{format_untrusted(value)}`",
                hint=f"set `model.{name}={format_untrusted(value)}`, or name other weights",
            )
    return [
        f"`model.{name}` is `{format_untrusted(value)}`; the weights were made without"
        for name, value in unexpressed.items()
        if name not in theirs
    ]


def _as_counted_here(provider: Any, settings: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return a hybrid's settings without pipeline stages, with its layers counted as the provider counts them."""
    pattern = settings.get(PATTERN)
    if not pattern:
        return settings
    return gpt_fields(settings) if provider.hybrid_layer_pattern is None else {**settings, PATTERN: without_stages(pattern)}


_OTHER_NAMES = {"apply_layernorm_1p": "layernorm_zero_centered_gamma", "num_experts": "num_moe_experts"}
"""Names in Megatron-LM's `args`, and those of TransformerConfig."""


def _both(provider: Any, config: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the fields that both have, as `config.json` describes them and as the provider has them."""
    derived = to_megatron(find(config.get("model_type")).CONFIG, config)
    if hasattr(provider, "rope_scaling"):  # which a `config.json` is silent on where it has none of them
        derived = {"rope_scaling_factor": provider.rope_scaling_factor, "seq_len_interpolation_factor": None} | derived
    described = {name: value for name, value in derived.items() if hasattr(provider, name) and name not in _OF_TRAINING}
    return described, {name: _plain(getattr(provider, name)) for name in described}


def _plain(value: Any) -> Any:
    try:
        return plain(value)
    except NotPlainError:
        return value


def _rope(config: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Return the rope settings after a change. Numbers that megatron-core has no fields for stay as they were."""
    old = rope_numbers(config)
    theta = changes.get("rope_theta", old.pop("rope_theta"))
    new = changes[_ROPE] if _ROPE in changes else old if old["rope_type"] != "default" else None
    unchanged = (
        {name: value for name, value in old.items() if name != "rope_theta"}
        if new and new["rope_type"] == old["rope_type"]
        else {}
    )
    return {"rope_theta": theta, _ROPE: new and {**new, **unchanged, **({"factor": new["factor"]} if "factor" in new else {})}}
