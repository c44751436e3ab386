"""Parts of a family's CONFIG that several families have: experts, layers that differ."""

from __future__ import annotations

from typing import Any, cast

from converter.config import Config, Field, counts, field, required, value
from formats.errors import UserError, format_untrusted


def routed(*, experts: str, topk: str, ffn: str, renormalized: str = "") -> tuple[Field, ...]:
    """Return the fields of a mixture of experts, and its sizes `experts` and `moe_ffn`, by their names in `config.json`.

    `renormalized` names the switch that says whether the weights of the chosen experts are made to sum to 1. Without one they are
    (megatron-core: `moe_router_pre_softmax` is not set).
    """
    fields = (
        required("num_moe_experts", experts),
        required("moe_router_topk", topk),
        required("moe_ffn_hidden_size", ffn),
        counts(experts="num_moe_experts", moe_ffn="moe_ffn_hidden_size"),
    )
    return (*fields, inverted("moe_router_pre_softmax", renormalized)) if renormalized else fields


def shared_experts(ffn: str) -> tuple[Field, ...]:
    """Return the fields of experts that every token goes through, and their size `shared_ffn`: the sum of all."""
    megatron = "moe_shared_expert_intermediate_size"
    return required(megatron, ffn), counts(shared_ffn=megatron)


def inverted(megatron: str, huggingface: str) -> Field:
    """Return a switch that is on in Megatron where it is off in Hugging Face; absent means on there."""
    return Field(
        lambda config: {megatron: not config.get(huggingface, True)},
        lambda config: {huggingface: not config.get(megatron, False)},
    )


def by_layer(megatron: str, huggingface: str, marks: dict[str, int], *, size: str) -> Field:
    """Return a list of numbers in Megatron, one for each layer, that `config.json` says in words (`layer_types`).

    Conditions know the layers marked 1 as the set `size`.
    """
    words = {mark: word for word, mark in marks.items()}

    def read(config: Config) -> dict[str, Any]:
        types = config.get(huggingface)
        if not isinstance(types, list) or len(cast("list[Any]", types)) != config.get("num_hidden_layers"):
            raise UserError(f"`{huggingface}` is `{format_untrusted(types)}`, which should have a word for each layer")
        unknown = next((word for word in cast("list[Any]", types) if not isinstance(word, str) or word not in marks), None)
        if unknown is not None:
            raise UserError(
                f"`{huggingface}` has `{format_untrusted(unknown)}`", hint=f"models of this family have {', '.join(marks)}"
            )
        return {megatron: [marks[word] for word in cast("list[str]", types)]}

    return Field(
        read,
        lambda config: {huggingface: [words[mark] for mark in config[megatron]]} if megatron in config else {},
        lambda sizes: {size: frozenset(layer for layer, mark in enumerate(sizes.megatron[megatron]) if mark)},
    )


def dimension(size: str, huggingface: str, *, megatron: str = "", default: int | None = None) -> tuple[Field, ...]:
    """Return a named size that `config.json` says, under the name that Megatron has for it."""
    name = megatron or huggingface
    one = required(name, huggingface) if default is None else field(name, huggingface, default=value(default))
    return one, counts(**{size: name})
