"""CONFIG fields of how a token's experts are chosen as DeepSeek's models do it, of their shared experts, and of the layers that
predict further tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

from converter.config import Config, Field, Sizes, count, field, fixed, number, one_of, value
from converter.config_experts import sparse_layers
from converter.config_layers import layers_of
from formats.errors import UserError, format_untrusted

GROUPS, CHOSEN, BEST = "moe_router_num_groups", "moe_router_group_topk", "moe_router_group_score"

FP32_SCORES = Field(lambda _config: {"moe_router_dtype": "fp32"}, lambda _config: {})
"""The field of a router that computes in fp32, whatever dtype the model has."""


def sigmoid_scores(*, scale: float | None = None, name: str = "routed_scaling_factor") -> tuple[Field, ...]:
    """Return the fields of scores by a sigmoid and a bias that moves the choice alone. Weights of the chosen experts sum to the
    field `name`, which is `scale` where it is absent; to 1 without a scale."""
    return (
        fixed(moe_router_score_function="sigmoid", moe_router_enable_expert_bias=True, moe_router_pre_softmax=False),
        FP32_SCORES,
        *(() if scale is None else (field("moe_router_topk_scaling_factor", name, default=value(scale)),)),
    )


def best_groups(groups: int | None, chosen: int | None, *, best: int, experts: str = "n_routed_experts") -> Field:
    """Return the field of experts that are chosen in the best groups of experts alone, by `n_group` and `topk_group`.

    The score of a group is the sum of its `best` best experts. megatron-core sums as many as each chosen group contributes;
    `moe_router_group_score` is the number where that is another. `groups` and `chosen` are what `config.json` means where it has
    none, `experts` its name of the number of experts.
    """

    def read(config: Config) -> dict[str, Any]:
        number_of_groups = config.get("n_group", groups)
        if number_of_groups in (None, 1):
            return {GROUPS: None, CHOSEN: None, BEST: None}
        numbers = {**config, "n_group": number_of_groups, "topk_group": config.get("topk_group", chosen)}
        of, taken, topk = (count(numbers, name) for name in ("n_group", "topk_group", "num_experts_per_tok"))
        _check_groups(count(config, experts), of, taken, topk, best)
        return {GROUPS: of, CHOSEN: taken, BEST: None if topk // taken == best else best}

    return Field(read, lambda config: _written_groups(config, best))


def _check_groups(experts: int, groups: int, chosen: int, topk: int, best: int) -> None:
    """Raise UserError for groups that no router can choose from."""
    size = experts // groups
    for is_wrong, text in (
        (experts % groups, f"{experts} experts cannot be divided evenly into {groups} groups"),
        (size < best, f"a group of {size} experts is rated by its {best} best"),
        (chosen > groups, f"{chosen} groups are chosen of {groups}"),
        (topk > chosen * size, f"{topk} experts are chosen in {chosen} groups of {size}"),
    ):
        if is_wrong:
            raise UserError(f"{text}: see `n_group` and `topk_group`", hint="`config.json` is damaged")


def _written_groups(config: Config, best: int) -> dict[str, Any]:
    groups, chosen = config.get(GROUPS), config.get(CHOSEN)
    if groups is None:
        return {"n_group": 1, "topk_group": 1}
    sums = config.get(BEST) or count(config, "moe_router_topk") // count(config, CHOSEN)
    if sums != best:
        raise UserError(f"a group of experts is rated by its `{sums}` best, and in this family by its `{best}` best")
    return {"n_group": number(GROUPS, groups), "topk_group": chosen}


def shared_multiple(default: int, *, name: str = "n_shared_experts") -> tuple[Field, ...]:
    """Return the fields of experts that every token goes through, `name` of the size of the others, and the size `shared_ffn` of
    all. `default` is how many there are where `config.json` does not say it."""
    megatron, ffn = "moe_shared_expert_intermediate_size", "moe_intermediate_size"

    def read(config: Config) -> dict[str, Any]:
        multiple = config.get(name, default)
        return {megatron: None if multiple == 0 else count({name: multiple}, name) * count(config, ffn)}

    def write(config: Config) -> dict[str, Any]:
        if config.get(megatron) is None:
            return {name: 0}
        total, of_expert = count(config, megatron), count(config, "moe_ffn_hidden_size")
        if total % of_expert:
            raise UserError(f"shared experts have `{total}` channels, which is not divisible by an expert's `{of_expert}`")
        return {name: total // of_expert}

    return (Field(read, write, lambda sizes: {"shared_ffn": sizes.megatron[megatron] or 0}),)


def dense_first(default: int, *, name: str = "first_k_dense_replace") -> Field:
    """Return the field of layers of which the first ones are dense; `default` is how many where `config.json` does not say it."""

    def read(config: Config) -> list[bool]:
        first = number(name, config.get(name, default))
        return [layer >= first for layer in range(layers_of(config))]

    def write(sparse: Sequence[bool]) -> dict[str, Any]:
        first = list(sparse).index(True) if any(sparse) else len(sparse)
        if not all(sparse[first:]):
            raise UserError("dense layers follow layers with experts, which no model of this family has")
        return {name: first}

    return sparse_layers(read, write)


def kinds_of_layers(first: int) -> Field:
    """Return the field of layers that `mlp_layer_types` calls `dense` or `sparse`. Without it, `first_k_dense_replace` layers are
    dense, or `first` of them."""

    def read(config: Config) -> list[bool]:
        dense = number(_FIRST, config.get(_FIRST, first))
        default = ["dense" if layer < dense else "sparse" for layer in range(layers_of(config))]
        listed: Any = default if config.get(_KINDS) is None else config[_KINDS]
        kinds = cast("list[Any]", listed) if isinstance(listed, list) else []
        if len(kinds) != len(default) or any(kind not in ("dense", "sparse") for kind in kinds):
            raise UserError(f"`{_KINDS}` is `{format_untrusted(listed)}`, which should have `dense` or `sparse` for each layer")
        if _FIRST in config:
            one_of({f"`{_KINDS}`": kinds, f"`{_KINDS}` by `{_FIRST}`": default})
        return [kind == "sparse" for kind in kinds]

    return sparse_layers(read, lambda sparse: {_KINDS: ["sparse" if kind else "dense" for kind in sparse]})


_FIRST, _KINDS = "first_k_dense_replace", "mlp_layer_types"


def prediction_layers(name: str = "num_nextn_predict_layers", *, most: int | None = None) -> Field:
    """Return the field of layers of multi-token prediction (MTP), `mtp_num_layers`, and their number `mtp`: at most `most`.
    `mtp_field` is `name`, for messages.

    Without the field there are none: a source's files may hold some all the same, and then they pass through.
    """

    def read(config: Config) -> dict[str, Any]:
        given = config.get(name)
        if given and most is not None and count(config, name) > most:
            raise UserError(
                f"`{name}` is `{given}`; only {most} is supported: this family's files have one projection for all such layers, "
                "and megatron-core one for each"
            )
        return {"mtp_num_layers": count(config, name) if given else None}

    def write(config: Config) -> dict[str, Any]:
        return {name: count(config, "mtp_num_layers") if config.get("mtp_num_layers") else 0}

    def sizes(before: Sizes) -> dict[str, Any]:
        return {"mtp": before.megatron.get("mtp_num_layers") or 0, "mtp_field": name}

    return Field(read, write, sizes)
