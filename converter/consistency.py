"""Check that all files of a checkpoint that describe its model describe the same one.

Tensors do not show everything: their shapes are the same for 8 heads of 32 and 4 of 64, and they show no rotary base. What
tensors do not show is compared wherever two of them say it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, cast

from converter import families
from converter.config import to_megatron
from converter.hybrid import PATTERN, without_stages
from converter.run_config import ModelSettings
from converter.side_files import CONFIG, HFReference
from formats.errors import UserError, format_untrusted
from formats.spec import TensorSpec

Fields = Mapping[str, Any]

_OF_TRAINING = {
    "attention_dropout", "expert_tensor_parallel_size", "hidden_dropout", "init_method_std", "moe_aux_loss_coeff", "seq_length",
}  # fmt: skip
"""Fields that training may change and that do not change what the weights compute."""

_HUGGINGFACE = {
    "activation_func": "hidden_act", "add_bias_linear": "attention_bias` or `mlp_bias", "ffn_hidden_size": "intermediate_size",
    "kv_channels": "head_dim", "layernorm_epsilon": "rms_norm_eps", "num_layers": "num_hidden_layers",
    "num_query_groups": "num_key_value_heads", "rope_scaling_factor": "factor` of `rope_scaling", "rotary_base": "rope_theta",
    "seq_len_interpolation_factor": "factor` of `rope_scaling", "share_embeddings_and_output_weights": "tie_word_embeddings",
    "window_size": "sliding_window",
}  # fmt: skip
"""The names in `config.json` of Megatron's fields, for messages."""


def check(
    origin: HFReference, others: Sequence[HFReference], recorded: Sequence[ModelSettings], *, rows: int | None, layout: str
) -> None:
    """Raise UserError if another description contradicts the reference, and name both.

    `rows`: the rows of the stored embedding, padding included; None if there is none. `layout`: the checkpoint's.
    """
    expected = _megatron_fields(origin.config, layout)
    sources = [(_megatron_fields(other.config, layout), f"{other.origin} `{CONFIG}`") for other in others]
    sources += [(settings.complete, settings.origin) for settings in recorded]
    for fields, source in sources:
        for name in differing(expected, fields, rows=rows):
            raise UserError(
                f"{_start(origin)} says that {_both_names(name)} is `{format_untrusted(expected.get(name))}`, {source} that it "
                f"is `{format_untrusted(fields.get(name))}`: no tensor shows which is right",
                hint=f"the weights were trained with one of them: correct the other, so that both have the same "
                f"{_both_names(name)}",
            )


def _start(origin: HFReference) -> str:
    return f"`{CONFIG}`, {origin.origin}," if origin.origin.startswith("rebuilt") else f"{origin.origin} `{CONFIG}`"


def _both_names(name: str) -> str:
    other = _HUGGINGFACE.get(name)
    return f"`{name}` (`{other}`)" if other else f"`{name}`"


def _megatron_fields(config: Fields, layout: str) -> dict[str, Any]:
    """Return Megatron's fields of a `config.json`, with None for those that it can lack."""
    absent = {"rope_scaling_factor": None, "seq_len_interpolation_factor": None, "window_size": None}
    return absent | to_megatron(families.find(config.get("model_type"), layout).CONFIG, config)


def differing(expected: Fields, fields: Fields, *, rows: int | None) -> Iterator[str]:
    """Yield the fields that both have and that describe two different models.

    >>> list(differing({"hidden_size": 64, "num_layers": 4}, {"hidden_size": 32, "seq_length": 8}, rows=None))
    ['hidden_size']
    """
    scaled = expected.get("rope_scaling") and fields.get("rope_scaling")
    unseen = {
        *_OF_TRAINING,
        "" if scaled else "rope_scaling_factor",
        "ffn_hidden_size" if _only_experts(expected) else "",
    }
    for name, value in expected.items():
        if name not in fields or name in unseen:
            continue
        if name == "vocab_size":
            if not _same_vocabulary(value, fields[name], rows):
                yield name
        elif name == PATTERN:
            if without_stages(value) != without_stages(fields[name]):
                yield name
        elif _comparable(value) != _comparable(fields[name]):
            yield name


def _only_experts(fields: Fields) -> bool:
    """Return whether every layer has experts: then no tensor has the size of a dense layer's MLP."""
    every = fields.get("moe_layer_freq") or 1
    return bool(fields.get("num_moe_experts")) and (
        every == 1 or (isinstance(every, (list, tuple)) and all(cast("list[Any]", every)))
    )


def _same_vocabulary(expected: Any, size: Any, rows: int | None) -> bool:
    """Accept a size that includes the padding: the number of stored rows."""
    return size is None or expected == size or (rows is not None and size == rows and expected <= rows)


def _comparable(value: Any) -> Any:
    """Return a value for a comparison: a switch that is off equals a setting that is absent, a tuple a list."""
    if value is None or value is False:
        return None
    return list(cast("tuple[Any]", value)) if isinstance(value, tuple) else value


def embedding_rows(specs: Mapping[str, TensorSpec]) -> int | None:
    """Return the rows of a checkpoint's embedding, padding included; None if it has no embedding."""
    spec = specs.get("embedding.word_embeddings.weight")
    return spec.shape[0] if spec and spec.shape else None
