"""How parallel ranks divide a model: which stage computes a layer, which boxes of a tensor a rank holds.

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
    """Tensor, pipeline and virtual pipeline sizes; `stages` counts layers per model chunk in megatron-core's order: all
    pipeline ranks of the first virtual stage, then the second."""

    tp: int
    pp: int
    vpp: int
    stages: tuple[int, ...]

    def stage(self, layer: int) -> int:
        """The pipeline rank that computes a layer; the first has what comes before them (-1), the last what comes after."""
        number = bisect_right(_ends(self.stages), layer) if layer >= 0 else 0
        return min(number, len(self.stages) - 1) % self.pp

    def rank(self, stage: int, tp_rank: int) -> int:
        """Megatron's global rank (order tp-cp-ep-dp-pp, one data-parallel replica)."""
        return stage * self.tp + tp_rank

    @property
    def even(self) -> bool:
        return len(set(self.stages)) == 1


@cache
def _ends(stages: tuple[int, ...]) -> tuple[int, ...]:
    """For each stage, the layer after its last."""
    return tuple(accumulate(stages))


def make_layout(model: Model, *, tp: int, pp: int, vpp: int, pp_layout: Sequence[int] | None) -> Layout:
    """A layout the model fits in.

    Raises UserError where tensor parallelism does not divide the model's sizes or the stages do not add up to its layers.
    """
    _check_tp(model, tp)
    if vpp > 1 and pp == 1:
        raise UserError(
            f"{vpp} virtual stages need more than 1 pipeline rank", hint="leave `--vpp` out, or choose a larger `--pp`"
        )
    if pp_layout is not None and min(pp_layout, default=0) < 0:
        raise UserError(f"`--pp-layout {','.join(map(str, pp_layout))}` has a negative number of layers")
    if pp * vpp > model.layers and not pp_layout:
        raise UserError(
            f"{pp} pipeline ranks × {vpp} virtual stages are more than the model's {model.layers} layers",
            hint="choose a smaller `--pp` or `--vpp`",
        )
    return Layout(tp, pp, vpp, _stages(model.layers, pp, vpp, pp_layout))


def _check_tp(model: Model, tp: int) -> None:
    groups, heads = model.groups, model.heads
    if groups % tp and tp % groups:
        raise UserError(
            f"tensor-parallel size {tp} neither divides the model's {groups} query groups nor is a multiple of them",
            hint=f"megatron-core takes {_divisors(groups)} or a multiple of {groups}",
        )
    for size, what in ((heads, "attention heads"), (model.ffn, "feed-forward size")):
        if size % tp:
            raise UserError(f"tensor-parallel size {tp} does not divide the model's {what}, {size}", hint="choose a divisor")
    if (rows := model.queries + 2 * model.keys) % tp:  # never where it divides the groups
        raise UserError(
            f"tensor-parallel size {tp} does not divide the {rows} rows of the model's query, key and value projection",
            hint=f"megatron-core takes {_divisors(groups)} or a multiple of {groups} that divides them",
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
            f"{layers} layers do not divide into {pp} pipeline ranks × {vpp} virtual stages",
            hint=f"say how many each takes, for example `--pp-layout {_proposal(layers, count)}`",
        )
    return (layers // count,) * count


def _proposal(layers: int, count: int) -> str:
    """Layers as evenly as can be; for absurd numbers of stages, the first few."""
    shown = min(count, 1024)
    return ",".join(str(layers // count + (number < layers % count)) for number in range(shown))


def shards(shape: Shape, cut: int | None, blocks: int, tp: int) -> list[tuple[Region, int]]:
    """The boxes that tile a tensor, block by block, each with the tensor-parallel rank that holds it."""
    whole = tuple(slice(0, size) for size in shape)
    if cut is None:
        return [(whole, 0)]
    size, pieces = shape[cut], tp * blocks
    if size % pieces:
        raise UserError(
            f"tensor-parallel size {tp} does not divide a dimension of {size // blocks}",
            hint="choose a divisor",
        )
    step = size // pieces
    return [
        ((*whole[:cut], slice(number * step, (number + 1) * step), *whole[cut + 1 :]), number % tp) for number in range(pieces)
    ]
