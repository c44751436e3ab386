"""Recognize Hugging Face weights that do not fit their `config.json`: quantized, renamed, or with another head.

Reads names and dtypes only, and refuses only what it recognizes; the plan accounts for everything else. Every hint leads to
weights that can be converted.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from converter import prediction_layers
from converter.families import Family
from converter.model import Model
from converter.plan import list_names
from converter.quantization import refuse_quantized
from converter.rules import at, extra_names, layer_names
from formats.errors import UserError
from formats.shard_files import INDEX
from formats.spec import TensorSpec

LAYER = re.compile(r"(?:(?<=layers\.)|(?<=blocks\.)|(?<=\bh\.))\d+(?=\.)")
"""The number of the layer in a name of any family."""

_CORE = re.compile(r"(?P<before>(?:.*?\.)??)(?P<core>(?:layers|blocks|h)\.0\..+|[^.]+\.[^.]+)")
"""A name in two parts: what differs by the class that saved it, and a layer's module or the last two words."""

_WRAPPERS = {
    "module": "DistributedDataParallel's or DeepSpeed's",
    "_orig_mod": "`torch.compile`'s",
    "_fsdp_wrapped_module": "FSDP's",
    "_checkpoint_wrapped_module": "activation checkpointing's",
    "_forward_module": "Lightning's",
    "base_model.model": "PEFT's",
    "base_layer": "PEFT's",
    "original_module": "PEFT's",
}
"""Parts of names that a wrapper around the model adds, and the wrapper's name."""


class _ForeignNames(NamedTuple):
    """Names that other programs or models give to weights: what they are, and what to do."""

    pattern: str
    description: str
    hint: str


_LORA = re.compile(r"(.*\.)?lora_[AB]\..*|.*\.lora_magnitude_vector")
_FOREIGN = (
    _ForeignNames(
        _LORA.pattern,
        "LoRA tensors that were not merged",
        "load it with PEFT and save `model.merge_and_unload()`; an adapter alone is put into its model by `mbconvert merge`",
    ),
    _ForeignNames(
        r"tok_embeddings\.weight|layers\.0\.attention\.w[qkvo]\.weight",
        "names of Meta's and Mistral's own format (`consolidated.safetensors`)",
        "fetch `model-*.safetensors` and their index of the same repository, or a repository for transformers",
    ),
    _ForeignNames(
        r"(module\.)*(decoder\.layers\.0\.|embedding\.word_embeddings\.).*",
        "Megatron's names",
        "load them in Megatron-LM and save them with `--ckpt-format torch_dist`; `mbconvert mcore-to-hf` converts that",
    ),
    _ForeignNames(r"blk\.\d+\..*|token_embd\.weight", "names of GGUF", "convert the original weights"),
    _ForeignNames(
        r"(transformer\.)?(h|blocks)\.\d+\..*|gpt_neox\..*",
        "names of another architecture (GPT-2, GPT-NeoX)",
        "take the `config.json` that belongs to these weights: its `model_type` says whose they are",
    ),
    _ForeignNames(
        r".*\.(qkv_proj|gate_up_proj|query_key_value|Wqkv)\..*",
        "projections fused into one tensor, as vLLM and other architectures keep them",
        "save the model with transformers (`save_pretrained`), under the architecture that `config.json` names",
    ),
    _ForeignNames(
        r"(model\.)?(vision\w*|visual|image\w*|multi_modal\w*|mm_\w+|audio\w*|speech\w*)\..*",
        "a part for images or sounds beside the language model",
        "leave out what is not the language model's: only that can be converted",
    ),
    _ForeignNames(
        r".*\.(experts|block_sparse_moe)\..*",
        "experts of a mixture",
        "take the `config.json` that belongs to these weights: by this one the model has none, or has them under other names",
    ),
)


def refuse_unfit(specs: Mapping[str, TensorSpec], config: Mapping[str, Any], family: Family, model: Model, *, label: str) -> None:
    """Raise UserError for weights that are recognized as other than the plain ones of this model. `label`: their folder."""
    bounded = model.replace(**{name: min(model.get(name, 0), len(specs)) for name in ("layers", "experts", "mtp")})
    expected = {LAYER.sub("0", name) for name in layer_names(family.RULES, bounded)}
    head = {name for rule in family.RULES if rule.tied_to for name in rule.names(at(model, 0))[1]}
    extras = extra_names(family.EXTRAS, model.replace(layers=1))
    passing = family.PASSTHROUGH_PREFIXES
    further = prediction_layers.further(family.RULES, bounded, specs)
    unplanned = (name in further or bool(passing and name.startswith(passing)) for name in specs)
    stored = {_in_layer_0(name): name for name, passes in zip(specs, unplanned, strict=True) if not passes}
    missing, unexpected = expected - stored.keys(), [stored[name] for name in sorted(stored.keys() - expected - head - extras)]
    refuse_quantized(specs, unexpected, config, label=label)
    if not missing and not unexpected:
        return
    if not any(_LORA.fullmatch(name) for name in unexpected):
        _refuse_renamed(expected - head, stored, head=head, label=label)
    for foreign in _FOREIGN:
        names = [name for name in unexpected if re.fullmatch(foreign.pattern, LAYER.sub("0", name))]
        if names and not any(re.fullmatch(foreign.pattern, name) for name in expected):
            raise UserError(f"`{label}` holds {list_names(names)}: {foreign.description}", hint=foreign.hint)
    _refuse_without_prediction(specs, family, bounded, label=label)
    bias = {rule.huggingface for rule in family.RULES if rule.megatron == "output_layer.bias"}
    if missing <= head | bias and (missing & head or unexpected):
        _refuse_head(missing, unexpected, label=label)


def _in_layer_0(name: str) -> str:
    """Return a name as it is in layer 0: `LAYER.sub`, without its search where `layers` alone is numbered."""
    before, word, after = name.partition("layers.")
    number, _, rest = after.partition(".")
    if word and number.isdecimal() and not ("layers." in rest or "blocks." in rest or "h." in rest):
        return f"{before}layers.0.{rest}"
    return LAYER.sub("0", name)


def _refuse_without_prediction(specs: Mapping[str, TensorSpec], family: Family, model: Model, *, label: str) -> None:
    """Raise UserError for a model without the layers of multi-token prediction that `config.json` names."""
    first = prediction_layers.names(family.RULES, model, 0) if model.get("mtp") else set[str]()
    if first and not any(name in specs for name in first):
        raise UserError(
            f"`{label}` lacks {list_names(sorted(first))}: `{model.mtp_field}` is `{model.mtp}`, and it has no layers of "
            "multi-token prediction",
            hint="transformers leaves them out where it saves a model: set the field to 0, or add their files",
        )


def _unwrap(name: str) -> tuple[str, list[str]]:
    """Return a name without the parts that wrappers add, and those parts."""
    parts = name.split(".")
    parts = ["base_model.model", *parts[2:]] if parts[:2] == ["base_model", "model"] else parts
    wrappers = list(dict.fromkeys(part for part in parts if part in _WRAPPERS))
    return ".".join(part for part in parts if part not in _WRAPPERS), wrappers


def _refuse_renamed(wanted: set[str], stored: Mapping[str, str], *, head: Iterable[str], label: str) -> None:
    """Raise UserError if weights have other prefixes than the model's, and say how to rename them.

    `stored`: the names in the folder, by the same names with layer 0. `head`: the weights of the output layer.
    """
    output = min(head, default="lm_head").partition(".")[0]
    cores = {match["core"]: (name, match["before"]) for name in sorted(wanted) if (match := _CORE.fullmatch(name))}
    for name in sorted(stored):
        plain, wrappers = _unwrap(name)
        match = _CORE.fullmatch(plain)
        if not match or match["core"] not in cores:
            continue
        expected, before = cores[match["core"]]
        if name != expected and name not in wanted:
            raise UserError(
                f"`{label}` holds `{stored[name]}`, which `config.json` calls `{_in_layer_of(stored[name], expected)}`: "
                f"{_cause(wrappers, match['before'], before)}",
                hint=_rename(wrappers, match["before"], before, stored, output),
            )


def _in_layer_of(name: str, expected: str) -> str:
    """Return the expected name with the layer of another name."""
    number = LAYER.search(name)
    return LAYER.sub(number[0], expected) if number else expected


def _cause(wrappers: Iterable[str], prefix: str, expected: str) -> str:
    """Return which wrappers and which prefix a name has, and the prefix it should have."""
    parts = [f"`{wrapper}.` is {_WRAPPERS[wrapper]}" for wrapper in wrappers]
    if "language_model" in prefix:
        parts.append("a model of text and images, whose text part has the prefix `language_model.`")
    elif prefix == "" and expected:
        parts.append(f"saved from `AutoModel`, without the prefix `{expected}` and without a head")
    elif prefix != expected:
        parts.append(f"the prefix is `{prefix}` instead of `{expected}`")
    return "; ".join(parts)


def _rename(wrappers: Iterable[str], prefix: str, expected: str, stored: Iterable[str], output: str) -> str:
    """Return Python that renames the tensors of one file. `output`: the output layer, which has no prefix."""
    new = "n" + "".join(f'.replace("{wrapper}.", "")' for wrapper in wrappers)
    extra = prefix.removesuffix(expected)
    if prefix == "":
        new = f'(n if n.startswith("{output}") else "{expected}" + n)' if not wrappers else f'"{expected}" + {new}'
    elif prefix != expected and prefix.endswith(f".{expected}"):
        new += f'.removeprefix("{extra}")'
    elif prefix != expected:
        new += f'.replace("{prefix}", "{expected}", 1)'
    kept = f' if "language_model." in n or n.startswith("{output}")' if "language_model" in prefix else ""
    text = (
        f'in each file `f`: `save_file({{{new}: t for n, t in load_file(f).items(){kept}}}, f, {{"format": "pt"}})` of '
        f"`safetensors.torch`; then remove `{INDEX}`"
    )
    if not any(output in name for name in stored):
        text += f"; if the model's head is tied, set `tie_word_embeddings` to true; if not, {_BODY}"
    return text


_BODY = (
    "take it from the model that this one was trained from: `m = AutoModelForCausalLM.from_pretrained(BASE)`, "
    "`m.model.load_state_dict(AutoModel.from_pretrained(DIR).state_dict())`, `m.save_pretrained(OUT)`"
)


_HEAD = re.compile(r"(\w+\.)?(scores?|\w*classifier|\w*heads?|qa_outputs|pooler|regress\w*|reward\w*|value\w*|logit\w*)(\..+)?")
"""Modules besides a model's body whose output is not tokens."""


def _refuse_head(missing: set[str], unexpected: list[str], *, label: str) -> None:
    """Raise UserError for a complete body with no head of a language model, or with another head."""
    heads = [name for name in unexpected if _HEAD.fullmatch(name)]
    if heads and len(heads) == len(unexpected) and not missing:
        again = f'`AutoModelForCausalLM.from_pretrained("{label}", dtype="auto").save_pretrained("OUT")`'
        raise UserError(
            f"`{label}` holds {list_names(heads)} beside the language model: a head for classification, rewards or values",
            hint=f"leave it out: {again}, then convert `OUT`",
        )
    if missing and len(heads) == len(unexpected):
        instead = f", but {list_names(heads)}: a head for classification, rewards or embeddings" if heads else ""
        raise UserError(
            f"`{label}` has no head of a language model ({list_names(sorted(missing))}){instead}",
            hint=f"if it is tied to the embedding, set `tie_word_embeddings` to true in `config.json`; if not, {_BODY}",
        )
