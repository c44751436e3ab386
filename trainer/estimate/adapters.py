"""Count what LoRA and DoRA add to the linear layers of a model, by megatron-core's names of those.

A method of the user's own cannot be counted: what its `transform` does depends on the layer.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from trainer.estimate.shape import Kind, Shape
from trainer.peft.dora import DoRA
from trainer.peft.fused_layers import part_names
from trainer.peft.lora import LoRA
from trainer.peft.targets import targeted_names

KNOWN = (LoRA, DoRA)


@dataclass(frozen=True, slots=True)
class Linear:
    """A linear layer of a transformer layer, with its sizes before ranks divide them."""

    name: str
    inputs: int
    parts: dict[str, int]
    """Outputs of each part of a fused layer, by its short name; or of the layer itself."""

    row: bool = False
    """Row parallel: ranks divide its inputs; else its outputs."""

    expert: int | None = None
    mixes: bool = False
    """Does it read or write what mixes tokens?"""

    @property
    def is_router(self) -> bool:
        """Whether its outputs are the logits of a router, which no ranks divide."""
        return self.name.endswith(".router")

    @property
    def outputs(self) -> int:
        """Outputs of all parts."""
        return sum(self.parts.values())


@dataclass(frozen=True, slots=True)
class AdapterSize:
    """The adapter of one linear layer, on one rank."""

    matrices: int
    """Parameters of all A and B."""

    magnitudes: int
    rank: int
    """Channels of A·x, of all A."""


def is_known(peft: Any) -> bool:
    """Tell whether a method's adapters can be counted: LoRA and DoRA, not classes derived from them."""
    return type(peft) in KNOWN


def linears(shape: Shape, number: int) -> Iterator[Linear]:
    """Yield the linear layers of layer `number`, counted from 0 in the whole model: those that mix tokens, the output projection
    last; the feed-forward network's two; or the router, each expert's two, and the shared expert's two."""
    mtp = number - shape.layers
    layer = f"decoder.layers.{(1 + shape.split) * number}" if mtp < 0 else f"mtp.layers.{mtp}.mtp_model_layer"
    yield from _mixing(layer, shape, shape.kinds[number])
    if shape.split:
        layer = f"decoder.layers.{2 * number + 1}"
    if shape.kinds[number].dense:
        yield from _mlp(f"{layer}.mlp", shape, shape.ffn)
    if shape.kinds[number].experts:
        yield from _experts(f"{layer}.mlp", shape)


def _mixing(layer: str, shape: Shape, kind: Kind) -> Iterator[Linear]:
    if kind.attends:
        for name, (inputs, parts) in shape.projections.items():
            yield Linear(f"{layer}.self_attention.{name}", inputs, parts, row=name == "linear_proj", mixes=True)
    if kind.recurrence:
        at, inner = f"{layer}.{kind.recurrence.name}", kind.recurrence.inner
        yield Linear(f"{at}.in_proj", shape.hidden, {"": kind.recurrence.projected}, mixes=True)
        yield Linear(f"{at}.out_proj", inner, {"": shape.hidden}, row=True, mixes=True)


def _experts(name: str, shape: Shape) -> Iterator[Linear]:
    yield Linear(f"{name}.router", shape.hidden, {"": shape.num_experts})
    for expert in range(shape.num_experts):
        yield from _mlp(f"{name}.experts.local_experts.{expert}", shape, shape.expert_ffn, expert)
    if shape.shared_ffn:
        yield from _mlp(f"{name}.shared_experts", shape, shape.shared_ffn)


def _mlp(name: str, shape: Shape, ffn: int, expert: int | None = None) -> Iterator[Linear]:
    first = {"gate": ffn, "up": ffn} if shape.gates == 2 else {"": ffn}
    hidden = shape.hidden if expert is None else shape.expert_hidden
    yield Linear(f"{name}.linear_fc1", hidden, first, expert=expert)
    yield Linear(f"{name}.linear_fc2", ffn, {"": hidden}, row=True, expert=expert)


def adapter_of(peft: Any, linear: Linear, *, ranks: int = 1) -> AdapterSize | None:
    """Return the size of a layer's adapter on one of the `ranks` that divide it; None where there is none, or none is known.

    Where ranks divide the outputs, each has all of A and its rows of B; where the inputs, its columns of A and all of B.
    Magnitudes are divided as the outputs are.
    """
    if not is_known(peft):
        return None
    chosen = targeted_names(linear.name, peft.aliases(linear.name), peft.target_modules, peft.exclude_modules)
    if not chosen:
        return None
    names = part_names(linear.name) if peft.canonical else {}
    outputs = [linear.parts.get(part, 0) for part, name in names.items() if name in chosen] if names else [linear.outputs]
    columns, rows = (linear.inputs // ranks, sum(outputs)) if linear.row else (linear.inputs, sum(outputs) // ranks)
    rank = peft.dim * len(outputs)
    return AdapterSize(rank * columns + peft.dim * rows, rows if isinstance(peft, DoRA) else 0, rank)


def first_trained(peft: Any, shape: Shape) -> int:
    """Return the first layer that gradients reach: layers before it have no adapter. 0 for an unknown method; the number of
    layers where no layer has an adapter."""
    if not is_known(peft):
        return 0
    layers = (number for number in range(shape.all_layers) if any(adapter_of(peft, linear) for linear in linears(shape, number)))
    return next(layers, shape.all_layers)


def multiplied_weights(peft: Any, shape: Shape) -> float:
    """Return the weights of A and B that one token is multiplied with; of experts, those that a token is sent to on average."""
    share = shape.active_experts / shape.num_experts if shape.num_experts else 0
    adapted = ((linear, adapter_of(peft, linear)) for number in range(shape.all_layers) for linear in linears(shape, number))
    return sum(added.matrices * (1 if linear.expert is None else share) for linear, added in adapted if added)
