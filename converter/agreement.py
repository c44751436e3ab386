"""Do all places that say something of a model say the same? Shapes agree for 8 heads of 32 and 4 of 64, and show no rotary base:
so what tensors do not show is compared wherever two places say it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, cast

from converter import families
from converter.config import to_megatron
from converter.run_config import Said
from converter.side_files import CONFIG, HFReference
from formats.errors import UserError, format_untrusted
from formats.spec import TensorSpec

Fields = Mapping[str, Any]

_OF_TRAINING = {"seq_length", "init_method_std", "attention_dropout", "hidden_dropout"}
"""What may change while a model is trained and does not change what its weights compute."""

_HUGGINGFACE = {
    "activation_func": "hidden_act", "add_bias_linear": "attention_bias` or `mlp_bias", "ffn_hidden_size": "intermediate_size",
    "kv_channels": "head_dim", "layernorm_epsilon": "rms_norm_eps", "num_layers": "num_hidden_layers",
    "num_query_groups": "num_key_value_heads", "rope_scaling_factor": "factor` of `rope_scaling", "rotary_base": "rope_theta",
    "seq_len_interpolation_factor": "factor` of `rope_scaling", "share_embeddings_and_output_weights": "tie_word_embeddings",
    "window_size": "sliding_window",
}  # fmt: skip
"""What `config.json` calls Megatron's fields, for messages."""


def check(origin: HFReference, others: Sequence[HFReference], said: Sequence[Said], *, rows: int | None) -> None:
    """Raise UserError where the reference and another place say different things of a model, and name both.

    `rows`: of the stored embedding, padding included; None where there is none.
    """
    ours = _of_config(origin.config)
    places = [(_of_config(other.config), f"{other.origin} `{CONFIG}`") for other in others]
    places += [(one.complete, one.origin) for one in said]
    for theirs, place in places:
        for name in differing(ours, theirs, rows=rows):
            raise UserError(
                f"{_start(origin)} says that {_called(name)} is `{_value(ours.get(name))}`, {place} that it is "
                f"`{_value(theirs.get(name))}`: no tensor shows which is right",
                hint=f"the weights were made with one of them: mend the other, so that both say the same of {_called(name)}",
            )


def _start(origin: HFReference) -> str:
    return f"`{CONFIG}`, {origin.origin}," if origin.origin.startswith("rebuilt") else f"{origin.origin} `{CONFIG}`"


def _called(name: str) -> str:
    other = _HUGGINGFACE.get(name)
    return f"`{name}` (`{other}`)" if other else f"`{name}`"


def _value(value: Any) -> str:
    return format_untrusted(value)


def _of_config(config: Fields) -> dict[str, Any]:
    """Megatron's fields of a `config.json`."""
    absent = {"rope_scaling_factor": None, "seq_len_interpolation_factor": None, "window_size": None}
    return absent | to_megatron(families.find(config.get("model_type")).CONFIG, config)


def differing(ours: Fields, theirs: Fields, *, rows: int | None) -> Iterator[str]:
    """Yield the fields that both have and that make two different models."""
    scaled = bool(ours.get("rope_scaling")) and bool(theirs.get("rope_scaling"))
    for name, value in ours.items():
        if name not in theirs or name in _OF_TRAINING or (name == "rope_scaling_factor" and not scaled):
            continue
        if name == "vocab_size":
            if not _same_vocabulary(value, theirs[name], rows):
                yield name
        elif _plain(value) != _plain(theirs[name]):
            yield name


def _same_vocabulary(ours: Any, theirs: Any, rows: int | None) -> bool:
    """One of them may count the padding: the rows that are stored."""
    return theirs is None or ours == theirs or (rows is not None and theirs == rows and ours <= rows)


def _plain(value: Any) -> Any:
    """A value as it is compared: switches that are off and settings that are absent are the same."""
    if value is None or value is False:
        return None
    return list(cast("tuple[Any]", value)) if isinstance(value, tuple) else value


def vocabulary_rows(specs: Mapping[str, TensorSpec]) -> int | None:
    """Return the rows of a checkpoint's embedding."""
    found = specs.get("embedding.word_embeddings.weight")
    return found.shape[0] if found and found.shape else None
