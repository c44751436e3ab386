"""CONFIG fields of mixtures of experts beside `config_parts.routed`: which layers have experts, and the loss that evens their
load."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

from converter.config import Config, Field, Sizes, count, fixed, number
from converter.config_layers import layers_of
from formats.errors import UserError, format_untrusted


def sparse_layers(
    read: Callable[[Config], Sequence[bool]],
    write: Callable[[Sequence[bool]], dict[str, Any]],
    *,
    layers: str = "num_hidden_layers",
) -> Field:
    """Return the field of which layers have experts, `moe_layer_freq`: a list of 1 and 0, or 1 where all have.

    `read` says of each layer of a `config.json` whether it has experts, and `write` returns the fields that say so. Conditions
    know the numbers of those layers as the set `sparse`. With a list, megatron-core names weights layer by layer (`stacked`).
    """

    def there(config: Config) -> dict[str, Any]:
        sparse = list(read(config))
        if len(sparse) != layers_of(config, layers):
            raise UserError(f"{len(sparse)} layers are said to have experts or none, and `{layers}` is {config[layers]}")
        return {"moe_layer_freq": 1 if all(sparse) else [int(is_sparse) for is_sparse in sparse]}

    def sizes(before: Sizes) -> dict[str, Any]:
        sparse = with_experts(before.megatron)
        return {"sparse": frozenset(layer for layer, is_sparse in enumerate(sparse) if is_sparse), "stacked": all(sparse)}

    return Field(there, lambda config: write(with_experts(config)), sizes)


def with_experts(megatron: Config) -> list[bool]:
    """Return of each layer whether it has experts. megatron-core takes a number n for each n-th layer, from the first on."""
    frequency, layers = megatron.get("moe_layer_freq", 1), layers_of(megatron, "num_layers")
    if isinstance(frequency, int) and frequency > 0:
        return [layer % frequency == 0 for layer in range(layers)]
    listed = cast("list[Any]", frequency) if isinstance(frequency, list) else []
    if len(listed) != layers or any(mark not in (0, 1) for mark in listed):
        raise UserError(
            f"`moe_layer_freq` is `{format_untrusted(frequency)}`, which should have 0 or 1 for each of {layers} layers"
        )
    return [bool(mark) for mark in listed]


def each_nth(step: str = "decoder_sparse_step", dense: str = "mlp_only_layers", *, dense_by_default: Sequence[int] = ()) -> Field:
    """Return the field of layers with experts where each n-th has some, counted from the last of the first n, unless it is in a
    list of dense ones: `dense_by_default` where there is no list."""

    def read(config: Config) -> list[bool]:
        every = count({step: config.get(step, 1)}, step)
        layers_without: Any = list(dense_by_default) if config.get(dense) is None else config[dense]
        if not isinstance(layers_without, list):
            raise UserError(f"`{dense}` is `{format_untrusted(layers_without)}`, which should be a list of layers")
        without = cast("list[Any]", layers_without)
        return [layer not in without and (layer + 1) % every == 0 for layer in range(layers_of(config))]

    def write(sparse: Sequence[bool]) -> dict[str, Any]:
        return {step: 1, dense: [layer for layer, is_sparse in enumerate(sparse) if not is_sparse]}

    return sparse_layers(read, write)


SOFTMAX = fixed(
    moe_router_score_function="softmax",
    moe_router_enable_expert_bias=False,
    moe_router_topk_scaling_factor=None,
    moe_router_num_groups=None,
    moe_apply_probs_on_input=False,
)
"""Experts are chosen by the softmax of their scores, or by the scores, among all; their outputs are weighted."""


BIASES = (
    fixed(add_bias_linear=True),
    Field(lambda _config: {"expert_tensor_parallel_size": 1}, lambda _config: {}),
)
"""All projections have biases, those of experts too, which megatron-core adds only where ranks have whole experts."""


def auxiliary_loss(
    default: float = 0.001, *, coefficient: str = "router_aux_loss_coef", switch: str = "output_router_logits"
) -> Field:
    """Return the field of the loss that evens the load of experts, which transformers adds where `switch` is on.

    transformers computes it once, of the tokens of all layers; megatron-core in each layer, and adds them up.
    """

    def read(config: Config) -> dict[str, Any]:
        return {"moe_aux_loss_coeff": number(coefficient, config.get(coefficient, default)) if config.get(switch) else 0.0}

    def write(config: Config) -> dict[str, Any]:
        weight = number("moe_aux_loss_coeff", config.get("moe_aux_loss_coeff", 0.0))
        return {switch: True, coefficient: weight} if weight else {switch: False}

    return Field(read, write)
