"""Write `run_config.yaml` as Megatron-Bridge does, and read the model's settings from any writer's checkpoint.

Megatron-Bridge instantiates the `model` section, so the file has every field that changes what the model computes. The other
fields have its defaults.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import yaml

from converter.config import Config
from converter.hybrid import PATTERN, with_stages
from converter.layout import Layout
from converter.pipeline_layout import format_layout
from formats.dtypes import FLOATS
from formats.errors import UserError, format_untrusted
from formats.faults import fault
from formats.folder import Folder
from formats.iterations import TORCH_DIST
from formats.spec import names_of

FILE = "run_config.yaml"
ARGS = "Megatron-LM's `args`"

_DEEPEST, _LONGEST = 64, 1 << 16

_ACTIVATIONS = {name: f"megatron.core.activations.{name}" for name in ("fast_gelu", "quick_gelu", "squared_relu")}
"""Where functions are that torch has not."""

_ABSENT = (
    "comm_overlap", "dataset", "ddp", "dist", "ft", "inprocess_restart", "mixed_precision", "nvrx_straggler", "peft",
    "scheduler", "straggler", "train",
)  # fmt: skip


def make(megatron: Config, layout: Layout, dtype: np.dtype[Any], *, vocab_multiple: int, ckpt_format: str = TORCH_DIST) -> bytes:
    """Return `run_config.yaml` for a converted model.

    `megatron` are the model's fields; one rank's vocabulary is padded to a multiple of `vocab_multiple` rows.
    """
    document = {
        "_target_": "megatron.bridge.training.config.ConfigContainer",
        "checkpoint": {
            "_target_": "megatron.bridge.training.config.CheckpointConfig",
            "ckpt_format": ckpt_format,
            "fully_parallel_save": False,
            "save_optim": False,
            "save_rng": False,
        },
        "model": {
            **_model(megatron, dtype),
            **_parallel(layout, megatron),
            "make_vocab_size_divisible_by": vocab_multiple,
        },
        "tokenizer": {
            "_target_": "megatron.bridge.training.tokenizers.config.TokenizerConfig",
            "tokenizer_model": "tokenizer",
            "tokenizer_type": "HuggingFaceTokenizer",
        },
        **dict.fromkeys(_ABSENT),
    }
    return yaml.safe_dump(document, sort_keys=True).encode()


def with_parallel_sizes(data: bytes, megatron: Config, layout: Layout, *, vocab_multiple: int, padded_vocab: int) -> bytes:
    """Return a `run_config.yaml` with other parallel sizes, and all else as it was. `megatron` are the model's fields."""
    known = document(data)
    model = {**_model_section(known), **_parallel(layout, megatron), "make_vocab_size_divisible_by": vocab_multiple}
    if model.get("padded_vocab_size") is not None:
        model["padded_vocab_size"] = padded_vocab
    return yaml.safe_dump({**known, "model": model}, sort_keys=True).encode()


def with_tokens(data: bytes, size: int) -> bytes:
    """Return a `run_config.yaml` with another number of tokens, without padding, and all else as it was."""
    known = document(data)
    model = _model_section(known)
    model["vocab_size"] = size
    if model.get("padded_vocab_size") is not None:
        model["padded_vocab_size"] = size
    return yaml.safe_dump({**known, "model": model}, sort_keys=True).encode()


def _model(megatron: Config, dtype: np.dtype[Any]) -> dict[str, Any]:
    names = names_of(dtype)
    return {
        **megatron,
        **(_HYBRID if megatron.get(PATTERN) else _GPT),
        "activation_func": _by_name(_ACTIVATIONS.get(function := megatron["activation_func"], f"torch.nn.functional.{function}")),
        "params_dtype": _by_name(f"torch.{names.torch if names.name in FLOATS else 'float32'}"),
        "bf16": names.name == "bf16",
        "fp16": names.name == "fp16",
        "gradient_accumulation_fusion": False,
        # Megatron-Bridge's export writes padding rows as if they were tokens. A model without padding can load a padded
        # checkpoint.
        "should_pad_vocab": False,
    }


def _by_name(target: str) -> dict[str, Any]:
    """Return Megatron-Bridge's encoding of a function or a constant, by name."""
    return {"_call_": False, "_target_": target}


_GPT = {
    "_target_": "megatron.bridge.models.gpt_provider.GPTModelProvider",
    "transformer_layer_spec": _by_name("megatron.bridge.models.gpt_provider.default_layer_spec"),
}
_HYBRID = {
    "_target_": "megatron.bridge.models.hybrid.hybrid_provider.HybridModelProvider",
    "hybrid_stack_spec": _by_name("megatron.bridge.models.hybrid.hybrid_provider.get_default_hybrid_stack_spec"),
}
"""What builds a model of each layout in Megatron-Bridge."""


def _parallel(layout: Layout, megatron: Config) -> dict[str, Any]:
    return {
        "tensor_model_parallel_size": layout.tp,
        "pipeline_model_parallel_size": layout.pp,
        "virtual_pipeline_model_parallel_size": layout.vpp if layout.vpp > 1 else None,
        **_stages(layout, megatron),
        "context_parallel_size": 1,
        "expert_model_parallel_size": layout.ep,
        "expert_tensor_parallel_size": layout.etp,
        "sequence_parallel": False,
    }


def _stages(layout: Layout, megatron: Config) -> dict[str, Any]:
    """The layers of each pipeline stage: a HybridModel has them in its pattern."""
    if pattern := megatron.get(PATTERN):
        return {PATTERN: with_stages(pattern, layout.stages), "pipeline_model_parallel_layout": None}
    mtp = megatron.get("mtp_num_layers") or 0
    return {"pipeline_model_parallel_layout": None if layout.even else format_layout(layout.stages, mtp=mtp)}


class UnknownModelError(UserError):
    """A checkpoint without settings of its model. Damaged or unsupported settings raise a plain UserError."""


@dataclass(frozen=True, slots=True)
class ModelSettings:
    """The settings of a checkpoint's model, as one file records them."""

    fields: Mapping[str, Any]
    """By the names of TransformerConfig and GPTModel; None if it says that there is none."""

    settings: Mapping[str, Any]
    """All recorded settings, by the names that they have there."""

    origin: str
    """The file, for messages."""

    @property
    def known(self) -> dict[str, Any]:
        """The fields that are not None."""
        return {name: value for name, value in self.fields.items() if value is not None}

    @property
    def complete(self) -> dict[str, Any]:
        """The fields, with Megatron's defaults for those that are None or absent; Hugging Face's defaults may differ."""
        hidden, heads = self.fields.get("hidden_size"), self.fields.get("num_attention_heads")
        defaults: dict[str, Any] = {"layernorm_epsilon": 1e-5}
        if isinstance(hidden, int) and isinstance(heads, int) and heads > 0:
            defaults |= {"num_query_groups": heads, "kv_channels": hidden // heads}
        return {**defaults, **{name: value for name, value in self.fields.items() if value is not None or name not in defaults}}


def read(iteration: Folder, args: Config) -> tuple[dict[str, Any], str] | None:
    """Return Megatron's fields of a checkpoint's model and their origin: `run_config.yaml`, else Megatron-LM's `args`."""
    recorded = read_all(iteration, args)
    return (recorded[0].known, recorded[0].origin) if recorded else None


def read_all(iteration: Folder, args: Config) -> list[ModelSettings]:
    """Return the recorded settings of a checkpoint's model, by precedence: `run_config.yaml`, Megatron-LM's `args`."""
    recorded = [_from_run_config(iteration.get(FILE))] if iteration.has(FILE) else []
    if not args.get("num_layers"):
        return recorded
    named = {name: value for name, value in cast("Mapping[Any, Any]", args).items() if isinstance(name, str)}
    settings = {"num_moe_experts" if name == "num_experts" else name: value for name, value in named.items()}
    return [*recorded, ModelSettings(_from_args(named), settings, ARGS)]


def _from_run_config(data: bytes) -> ModelSettings:
    section = _model_section(document(data))
    return ModelSettings(model_fields(section), section, f"`{FILE}`")


def document(data: bytes, *, source: str = FILE) -> Any:
    """Return the content of a YAML file of settings. Raises UserError if it is not readable or beyond limits."""
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    try:
        _check_events(cast("Any", yaml).parse(data, Loader=loader))
        return yaml.load(data, Loader=loader)  # noqa: S506
    except _RefusedError as error:
        raise UserError(f"`{source}` is not readable: {error.args[0]}") from error
    except Exception as error:  # a damaged value makes the parser raise anything
        raise UserError(f"`{source}` is not readable as YAML: {_why(data, error)}") from error


class _RefusedError(ValueError):
    """A document beyond the limits of a settings file. Its message is ours and safe to show."""


def _why(data: bytes, error: Exception) -> str:
    """Return why a document is not readable. The C parser has its own limit of depth, and may stop there before any event: the
    Python parser then says which limit of ours the document exceeds."""
    try:
        _check_events(cast("Any", yaml).parse(data, Loader=yaml.SafeLoader))
    except _RefusedError as refused:
        return str(refused.args[0])
    except (yaml.YAMLError, ValueError, RecursionError):
        pass
    return fault(error)


def _check_events(events: Iterable[Any]) -> None:
    """Raise _RefusedError for a document that would overflow the C loader's stack, or grow without bound by merged keys."""
    depth = 0
    for event in events:
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > _DEEPEST:
            raise _RefusedError(f"it is nested deeper than {_DEEPEST} levels")
        if isinstance(event, yaml.ScalarEvent) and (event.value == "<<" or len(event.value) > _LONGEST):
            raise _RefusedError("it merges keys, or holds a value longer than any setting")


def _model_section(document: Any) -> dict[str, Any]:
    section = cast("dict[str, Any]", document).get("model") if isinstance(document, dict) else None
    if not isinstance(section, dict):
        raise UserError(f"`{FILE}` has no `model` section")
    return {name: value for name, value in cast("dict[Any, Any]", section).items() if isinstance(name, str)}


def model_fields(section: Config) -> dict[str, Any]:
    """Return the fields of a model's section, the activation function by its name."""
    activation = section.get("activation_func")
    plain = {name: value for name, value in section.items() if not isinstance(value, Mapping)}
    if isinstance(activation, Mapping):
        plain["activation_func"] = format_untrusted(cast("Config", activation).get("_target_")).rpartition(".")[2]
    return {**plain, **_scaled_by_provider(section)}


def _scaled_by_provider(section: Config) -> dict[str, Any]:
    """Return Llama-3.1's rope scaling of Megatron-Bridge's `Llama31ModelProvider`, which has fields of its own for it."""
    if section.get("scale_factor") is None or section.get("old_context_len") is None:
        return {}
    return {"rope_scaling": True, "rope_scaling_factor": section["scale_factor"]}


_SAME_NAMES = (
    "num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "kv_channels", "init_method_std",
    "attention_dropout", "add_bias_linear", "add_qkv_bias", "rotary_base", "rope_scaling_factor", "normalization",
    "position_embedding_type", "rotary_percent", "window_size", "qk_layernorm", "vocab_size",
)  # fmt: skip
_ONE_MORE = ("NullTokenizer", "NullMultimodalTokenizer")
"""Tokenizers with one token more than `vocab_size` in most versions of Megatron-LM: the end of a document."""

RENAMED = {
    "rope_scaling": "use_rope_scaling", "seq_len_interpolation_factor": "rotary_seq_len_interpolation_factor",
}  # fmt: skip
"""Megatron-LM's names of fields that mean the same."""


def _from_args(args: Config) -> dict[str, Any]:
    """Return TransformerConfig's fields of Megatron-LM's command line, as its `core_transformer_config_from_args` does."""
    heads = args.get("num_attention_heads")
    return {
        **{name: args[name] for name in _SAME_NAMES if name in args},
        **{name: args[theirs] for name, theirs in RENAMED.items() if theirs in args},
        "num_query_groups": args.get("num_query_groups") if args.get("group_query_attention") else heads,
        "seq_length": args.get("max_position_embeddings") or args.get("seq_length"),
        "layernorm_epsilon": args.get("norm_epsilon") or args.get("layernorm_epsilon"),
        "share_embeddings_and_output_weights": not args.get("untie_embeddings_and_output_weights"),
        "gated_linear_unit": bool(args.get("swiglu") or args.get("gated_linear_unit")),
        "activation_func": "silu" if args.get("swiglu") else args.get("activation_func") or "gelu",
        **({"vocab_size": None} if args.get("tokenizer_type") in _ONE_MORE else {}),
        **_experts_from_args(args),
        **({PATTERN: args[PATTERN], "is_hybrid_model": True} if args.get(PATTERN) else {}),
    }


def _experts_from_args(args: Config) -> dict[str, Any]:
    """Return the fields of experts, which have one name in both but for their number; none of a model without experts."""
    if not args.get("num_experts"):
        return {}
    return {"num_moe_experts": args["num_experts"], **{name: value for name, value in args.items() if name.startswith("moe_")}}
