"""Read a checkpoint of megatron-core's GPTModel into a HybridModel of the same weights, and the reverse: under its names.

    GPTModel, layers alike       decoder.layers.mlp.linear_fc2.weight       [layers, …]
    GPTModel, layers that differ decoder.layers.1.mlp.linear_fc2.weight
    HybridModel                  decoder.layers.3.mlp.linear_fc2.weight     layer 2i is attention, 2i + 1 feed-forward

An optimizer's state is named after the weights' sharded state, and follows it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.dict_utils import dict_list_map_inplace
from megatron.core.dist_checkpointing.mapping import (
    LocalNonpersistentObject,
    ShardedObject,
    ShardedTensor,
    ShardedTensorFactory,
)

from formats.errors import UserError
from trainer.layers.pattern import is_hybrid, layers_of_each

_LAYER = re.compile(r"(?P<before>.*\bdecoder\.layers\.)(?:(?P<number>\d+)\.)?(?P<rest>.+)")
_FEED_FORWARD = ("mlp.", "pre_mlp_layernorm.")
_FINAL = {False: ".final_layernorm.", True: ".final_norm."}
"""The last norm's name, by whether the model is a hybrid."""

State = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Names:
    """How a checkpoint names weights, where it does so unlike the model."""

    hybrid: bool
    stacked: bool
    """Whether one tensor holds a weight of all layers, of which there are `layers`."""

    layers: int

    def apply(self, weights: State) -> State:
        """Name the leaves of a chunk's sharded state dict as the checkpoint does. Its own keys stay."""
        return {name: self._of(leaf) for name, leaf in weights.items()}

    def _of(self, leaf: Any) -> Any:
        if isinstance(leaf, ShardedTensorFactory):
            return replace(leaf, build_fn=_Built(leaf.build_fn, self))
        if isinstance(leaf, ShardedObject) and leaf.key == "output_layer._extra_state":
            return LocalNonpersistentObject(None)  # only HybridModel saves one
        return self.renamed(leaf) if isinstance(leaf, (ShardedTensor, ShardedObject)) else leaf

    def renamed(self, leaf: Any) -> Any:
        """Name one shard, of a weight or of an optimizer's state, as the checkpoint does."""
        match = _LAYER.fullmatch(leaf.key)
        if match is None:
            return replace(leaf, key=leaf.key.replace(_FINAL[not self.hybrid], _FINAL[self.hybrid]))
        number, rest = match["number"], match["rest"]
        stacked = number is None
        layer = leaf.global_offset[0] if stacked else int(number)
        saved_layer = 2 * layer + rest.startswith(_FEED_FORWARD) if self.hybrid else layer // 2
        key = match["before"] + (rest if self.stacked else f"{saved_layer}.{rest}")
        return replace(leaf, key=key, **_axes(leaf, saved_layer, self.layers if self.stacked else None, stacked=stacked))


def _axes(leaf: Any, layer: int, layers: int | None, *, stacked: bool) -> dict[str, Any]:
    """Return the axes of a shard with a first one for `layer` of `layers`, or without it."""
    first = 1 if stacked else 0
    sizes, indices = ((), ()) if layers is None else ((layers,), (layer,))
    shape, offset = leaf.global_shape[first:], leaf.global_offset[first:]
    if isinstance(leaf, ShardedObject):  # of which one for all has one axis
        if shape == (1,):
            shape = offset = ()
        return {"global_shape": (*sizes, *shape) or (1,), "global_offset": (*indices, *offset) or (0,)}
    return {
        "global_shape": (*sizes, *shape),
        "global_offset": (*indices, *offset),
        "axis_fragmentations": (*sizes, *(leaf.axis_fragmentations or ())[first:]),
        "prepend_axis_num": leaf.prepend_axis_num - first + len(sizes),
    }


@dataclass(frozen=True, slots=True)
class _Built:
    """A factory's function whose shards are named as in the checkpoint."""

    build: Any
    names: Names

    def __call__(self, *args: Any) -> Any:
        built = {"": self.build(*args)}
        dict_list_map_inplace(lambda leaf: self.names.renamed(leaf) if isinstance(leaf, ShardedTensor) else leaf, built)
        return built[""]


def names_of(folder: Path, model: Any, *, peft: Any, sharding: str) -> Names | None:
    """Return how a checkpoint names the weights of a model in another layout; None where both have one.

    Raises UserError where that layout cannot be read: the model has layers of other kinds, or what is stored is not named by
    layers.
    """
    if peft is not None:
        return None  # whose description says its layout
    saved: Mapping[str, Any] = dist_checkpointing.load_tensors_metadata(str(folder))
    hybrid = any(_FINAL[True].strip(".") in name for name in saved)
    is_hybrid_run = is_hybrid(model)
    if hybrid == is_hybrid_run or not any(name.startswith("decoder.") for name in saved):
        return None
    return _other(folder, model, saved, sharding=sharding)


def _other(folder: Path, model: Any, saved: Mapping[str, Any], *, sharding: str) -> Names:
    is_hybrid_run = is_hybrid(model)
    saved_layout, layout = ("gpt", "hybrid") if is_hybrid_run else ("hybrid", "gpt")
    reason = ""
    if is_hybrid_run and layers_of_each(model) != 2:
        reason = f"the model's layers, `{model.hybrid_layer_pattern}`, are not those of a GPT model"
    elif sharding == "dp_reshardable":
        reason = "the optimizer's state is stored `dp_reshardable`, not by weights"
    if reason:
        raise UserError(
            f"`{folder}` was saved in the layout `{saved_layout}`, and `model.layout` is `{layout}`: {reason}",
            hint=f"set `model.layout={saved_layout}`, or start from the weights with `checkpoint.pretrained_checkpoint`",
        )
    numbered = any(match["number"] for match in map(_LAYER.fullmatch, saved) if match)
    return Names(hybrid=not is_hybrid_run, stacked=is_hybrid_run and not numbered, layers=model.num_layers)
