"""The hyper-parameters of parameter groups, where every group of data-parallel ranks stores its own: they must agree."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, cast

from formats.errors import UserError, format_untrusted
from formats.object_names import ObjectName
from formats.optimizer.state import LOSS_SCALE
from formats.torch_dist import TorchDistReader

_IDENTITY = ("wd_mult", "lr_mult", "is_expert_parallel", "is_decoupled_lr", "max_lr", "min_lr")
"""What tells parameter groups apart, beside their order; the ranks of a pipeline may have them in different orders."""

_LOCAL = ("params",)


def base(chained: str, group: int) -> str:
    """Return how the names of the state of one optimizer begin in one group of data-parallel ranks."""
    return f"{f'chained_{chained}.' if chained else ''}optimizer.distributed.dp_group_idx_{group}"


def of_ranks(reader: TorchDistReader, chained: str, numbers: Iterable[int]) -> list[dict[str, Any]]:
    """Return its parameter groups. Raises UserError where one of `numbers`, its groups of ranks, has none, or others."""
    together: dict[tuple[Any, ...], tuple[str, dict[str, Any]]] = {}
    for number in numbers:
        name = str(ObjectName(f"{base(chained, number)}.optimizer"))
        for identity, hyper in _identified(_param_groups(reader, name)):
            source, known = together.setdefault(identity, (name, hyper))
            _check_same(source, known, name, hyper)
    return [hyper for _, hyper in together.values()]


def loss_scale(reader: TorchDistReader, chained: str, number: int) -> Mapping[str, Any]:
    """Return the loss scale in a group of ranks, which all of them share."""
    name = str(ObjectName(f"{base(chained, number)}.{LOSS_SCALE}"))
    if name not in reader.container.object_names:
        return {}
    archive = reader.container.archive(name)
    match archive.pickle():
        case {**stored} | [{**stored}]:
            return archive.resolved(stored)
        case _:
            return {}


def are_of_experts(hyper: Sequence[Mapping[str, Any]]) -> bool:
    """Return whether these are the parameter groups of experts that have an optimizer of their own."""
    return any(group.get("is_expert_parallel") for group in hyper)


def _param_groups(reader: TorchDistReader, name: str) -> list[dict[str, Any]]:
    if name not in reader.container.object_names:
        raise UserError(
            f"the checkpoint has no `{name}`, the hyper-parameters of a group of ranks",
            hint="the checkpoint is incomplete: copy it again",
        )
    match reader.container.archive(name).pickle():
        case {"param_groups": [*known]} | [{"param_groups": [*known]}]:
            return [
                {key: value for key, value in cast("dict[str, Any]", group).items() if key not in _LOCAL}
                for group in known
                if isinstance(group, dict)
            ]
        case _:
            raise UserError(f"`{name}` has no `param_groups`", hint="the checkpoint is damaged")


def _identified(known: Iterable[dict[str, Any]]) -> Iterable[tuple[tuple[Any, ...], dict[str, Any]]]:
    """Yield parameter groups with what tells them apart."""
    counts: dict[tuple[Any, ...], int] = {}
    for hyper in known:
        identity = tuple(format_untrusted(hyper.get(field)) for field in _IDENTITY)
        counts[identity] = counts.get(identity, 0) + 1
        yield (*identity, counts[identity]), hyper


def _check_same(source: str, known: Mapping[str, Any], name: str, other: Mapping[str, Any]) -> None:
    for field in {**known, **other}:
        ours, theirs = known.get(field), other.get(field)
        if ours != theirs:
            raise UserError(
                f"`{field}` of a parameter group is {format_untrusted(ours)} in `{source}` "
                f"and {format_untrusted(theirs)} in `{name}`",
                hint="the checkpoint is damaged or was mixed from two",
            )
