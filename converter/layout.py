"""How parallel ranks divide a model: which stage computes a layer, which shards of a tensor a rank holds.

Pure arithmetic on sizes: knows no names of weights and no files.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from itertools import accumulate

from converter.model import Model
from formats.errors import UserError
from formats.spec import Region, Shape


@dataclass(frozen=True, slots=True)
class Layout:
    """Sizes of tensor, pipeline, virtual pipeline, expert and expert tensor parallelism.

    `stages` counts layers per model chunk in megatron-core's order: all pipeline ranks of the first virtual stage, then the
    second.
    """

    tp: int
    pp: int
    vpp: int
    stages: tuple[int, ...]
    ep: int = 1
    etp: int = 1

    def stage(self, layer: int) -> int:
        """Return the pipeline rank that computes a layer; the first has what comes before (-1), the last what comes after."""
        return self.model_chunk(layer) % self.pp

    def model_chunk(self, layer: int) -> int:
        """Return the number in `stages` of the model chunk that computes a layer."""
        number = bisect_right(_ends(self.stages), layer) if layer >= 0 else 0
        return min(number, len(self.stages) - 1)

    def first_layer(self, chunk: int) -> int:
        """Return the first layer of a model chunk."""
        return sum(self.stages[:chunk])

    def rank(self, stage: int, tp_rank: int, ep_rank: int | None = None) -> int:
        """Return Megatron's global rank (order tp-cp-ep-dp-pp, one replica); with an `ep_rank`, `tp_rank` counts shards of an
        expert.

        A stage has as many ranks as either its attention or its experts need.
        """
        number = tp_rank if ep_rank is None else ep_rank * self.etp + tp_rank
        return stage * max(self.tp, self.ep * self.etp) + number

    def expert_owner(self, expert: int, experts: int) -> int:
        """Return the expert-parallel rank that holds an expert."""
        return expert // (experts // self.ep)

    @property
    def even(self) -> bool:
        return len(set(self.stages)) == 1


@cache
def _ends(stages: tuple[int, ...]) -> tuple[int, ...]:
    """For each stage, the layer after its last."""
    return tuple(accumulate(stages))


def make_layout(
    model: Model, *, tp: int, pp: int, vpp: int, pp_layout: Sequence[int] | None, ep: int = 1, etp: int | None = None
) -> Layout:
    """Return a layout the model fits in. `etp` is `tp` unless given, as in Megatron-LM.

    Raises UserError where tensor or expert parallelism does not divide the model's sizes or the stages do not add up to its
    layers.
    """
    _check_tp(model, tp)
    etp = _check_experts(model, ep, etp, tp)
    if vpp > 1 and pp == 1:
        raise UserError(
            f"{vpp} virtual stages need more than 1 pipeline rank", hint="leave `--vpp` out, or choose a larger `--pp`"
        )
    if pp_layout is not None and min(pp_layout, default=0) < 0:
        raise UserError(f"`--pp-layout {','.join(map(str, pp_layout))}` has a negative number of layers")
    layers = model.megatron_layers
    if pp * vpp > layers and not pp_layout:
        raise UserError(
            f"{pp} pipeline ranks × {vpp} virtual stages are more than the model's {layers} layers",
            hint="choose a smaller `--pp` or `--vpp`",
        )
    return Layout(tp, pp, vpp, _stages(layers, pp, vpp, pp_layout), ep, etp)


def _check_experts(model: Model, ep: int, etp: int | None, tp: int) -> int:
    """Return the size of expert tensor parallelism: `tp` unless given, 1 for a model without experts."""
    experts = model.get("experts", 0)
    if not experts:
        for name, what, size in (("ep", "expert-parallel", ep), ("etp", "expert-tensor-parallel", etp or 1)):
            if size > 1:
                raise UserError(f"{what} size {size} needs a model with experts, which this is not", hint=f"leave `--{name}` out")
        return 1
    if experts % ep:
        raise UserError(
            f"expert-parallel size {ep} does not divide the model's {experts} experts",
            hint=f"`--ep` may be {_divisors(experts)}",
        )
    if "moe_ffn" in model and model.moe_ffn % (size := etp or tp):
        given = "" if etp else ", which `--tp` is unless `--etp` is given,"
        raise UserError(
            f"expert-tensor-parallel size {size}{given} does not divide the experts' feed-forward size, {model.moe_ffn}",
            hint="choose a divisor with `--etp`; 1 keeps each expert whole",
        )
    return etp or tp


_DIVIDED = (("heads", "attention heads"), ("ffn", "feed-forward size"), ("shared_ffn", "feed-forward size of shared experts"),
            ("mamba_groups", "Mamba groups"), ("mamba_heads", "Mamba heads"), ("linear_heads", "linear-attention heads"),
            ("linear_groups", "linear-attention groups"))  # fmt: skip
"""Sizes that a family may have, which tensor parallelism has to divide, in words."""


def _check_tp(model: Model, tp: int) -> None:
    if "groups" in model:
        _check_groups(model.groups, tp)
    for name, what in _DIVIDED:
        if name == "ffn" and _is_sparse(model):
            continue
        if (size := model.get(name, 0)) % tp:
            raise UserError(f"tensor-parallel size {tp} does not divide the model's {what}, {size}", hint="choose a divisor")
    if "groups" in model and (rows := model.queries + 2 * model.keys) % tp:  # never where it divides the groups
        raise UserError(
            f"tensor-parallel size {tp} does not divide the {rows} rows of the model's query, key and value projection",
            hint=f"megatron-core takes {_divisors(model.groups)} or a multiple of {model.groups} that divides them",
        )


def _is_sparse(model: Model) -> bool:
    """Has every layer experts, so that no feed-forward part is divided as attention is?"""
    return bool(model.get("experts")) and len(model.get("sparse", range(model.layers))) == model.layers


def _check_groups(groups: int, tp: int) -> None:
    if groups % tp and tp % groups:
        raise UserError(
            f"tensor-parallel size {tp} neither divides the model's {groups} query groups nor is a multiple of them",
            hint=f"megatron-core takes {_divisors(groups)} or a multiple of {groups}",
        )


def _divisors(number: int) -> str:
    return ", ".join(str(n) for n in range(1, min(number, 4096) + 1) if number % n == 0)


def _stages(layers: int, pp: int, vpp: int, given: Sequence[int] | None) -> tuple[int, ...]:
    count = pp * vpp
    if given:
        if len(given) != count or sum(given) != layers:
            raise UserError(
                f"`--pp-layout {','.join(map(str, given))}` has {len(given)} stages and {sum(given)} layers; "
                f"{pp} pipeline ranks × {vpp} virtual stages need {count}, the model has {layers} layers",
                hint=f"for example `--pp-layout {_proposal(layers, count)}`",
            )
        return tuple(given)
    if layers % count:
        raise UserError(
            f"{layers} layers cannot be divided evenly into {pp} pipeline ranks × {vpp} virtual stages",
            hint=f"say how many each takes, for example `--pp-layout {_proposal(layers, count)}`",
        )
    return (layers // count,) * count


def _proposal(layers: int, count: int) -> str:
    """Layers as evenly as can be; for absurd numbers of stages, the first few."""
    shown = min(count, 1024)
    return ",".join(str(layers // count + (number < layers % count)) for number in range(shown))


def shards(shape: Shape, partition_dim: int | None, partition_stride: int, tp: int) -> list[tuple[Region, int]]:
    """Return the shards that tile a tensor, block by block, each with the tensor-parallel rank that holds it."""
    whole = tuple(slice(0, size) for size in shape)
    if partition_dim is None:
        return [(whole, 0)]
    before, after = whole[:partition_dim], whole[partition_dim + 1 :]
    size, count = shape[partition_dim], tp * partition_stride
    if size % count:
        raise UserError(
            f"tensor-parallel size {tp} does not divide a dimension of {size // partition_stride}",
            hint="choose a divisor",
        )
    step = size // count
    return [((*before, slice(number * step, (number + 1) * step), *after), number % tp) for number in range(count)]
