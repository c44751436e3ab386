"""What LoRA and DoRA compute and keep beside the linear layers of a model, by the names that megatron-core gives those.

Knows no method of somebody's own: what `transform` would make of a layer cannot be told without the layer.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from trainer.estimate.shape import Shape
from trainer.peft.dora import DoRA
from trainer.peft.fused_layers import part_names
from trainer.peft.lora import LoRA
from trainer.peft.targets import targeted_names

KNOWN = (LoRA, DoRA)


@dataclass(frozen=True, slots=True)
class Linear:
    """A linear layer of a transformer layer, whole: sizes are those before ranks divide them."""

    name: str
    inputs: int
    parts: dict[str, int]
    """Outputs of each of those that are computed as one, by their short names; or of the layer itself."""

    row: bool = False
    """Ranks divide its inputs; else its outputs."""

    expert: int | None = None

    @property
    def outputs(self) -> int:
        """Those of all parts."""
        return sum(self.parts.values())


@dataclass(frozen=True, slots=True)
class AdapterSize:
    """What stands beside one linear layer on one rank."""

    matrices: int
    """Parameters of all A and B."""

    magnitudes: int
    rank: int
    """Channels of A·x, of all A."""


def is_known(peft: Any) -> bool:
    """Is it a method whose adapters can be counted? A class made from one may do anything."""
    return type(peft) in KNOWN


def linears(shape: Shape, number: int) -> Iterator[Linear]:
    """The linear layers of layer `number`, counted from 0 in the whole model: attention's two, the feed-forward network's or
    each expert's two, the shared expert's two."""
    layer = f"decoder.layers.{number}"
    yield Linear(f"{layer}.self_attention.linear_qkv", shape.hidden, {"q": shape.queries, "k": shape.keys, "v": shape.keys})
    yield Linear(f"{layer}.self_attention.linear_proj", shape.queries, {"": shape.hidden}, row=True)
    if not shape.experts[number]:
        yield from _mlp(f"{layer}.mlp", shape, shape.ffn)
        return
    for expert in range(shape.num_experts):
        yield from _mlp(f"{layer}.mlp.experts.local_experts.{expert}", shape, shape.expert_ffn, expert)
    if shape.shared_ffn:
        yield from _mlp(f"{layer}.mlp.shared_experts", shape, shape.shared_ffn)


def _mlp(name: str, shape: Shape, ffn: int, expert: int | None = None) -> Iterator[Linear]:
    first = {"gate": ffn, "up": ffn} if shape.gates == 2 else {"": ffn}
    yield Linear(f"{name}.linear_fc1", shape.hidden, first, expert=expert)
    yield Linear(f"{name}.linear_fc2", ffn, {"": shape.hidden}, row=True, expert=expert)


def adapter_of(peft: Any, linear: Linear, *, ranks: int = 1) -> AdapterSize | None:
    """The adapter of a layer that `ranks` divide, on one of them; None where there is none, or none is known.

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
    """The first layer that is reached by gradients: those before it have no adapter, and nothing before them is trained. 0 for
    a method that is not known; the number of layers where no layer has an adapter."""
    if not is_known(peft):
        return 0
    layers = (number for number in range(shape.layers) if any(adapter_of(peft, linear) for linear in linears(shape, number)))
    return next(layers, shape.layers)


def multiplied_weights(peft: Any, shape: Shape) -> float:
    """Weights of A and B that one token is multiplied with: of experts, those that a token is sent to on average."""
    share = shape.active_experts / shape.num_experts if shape.num_experts else 0
    adapted = ((linear, adapter_of(peft, linear)) for number in range(shape.layers) for linear in linears(shape, number))
    return sum(added.matrices * (1 if linear.expert is None else share) for linear, added in adapted if added)
