"""Does an adapter fit a base? Looked at before anything is written: every weight it changes, of which shape, with which numbers.

Reads all of the adapter once, one weight's at a time, and no data of the base.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, cast

import numpy as np
from blake3 import blake3

from converter import families
from converter.adapters.adapter import Adapter, Delta
from converter.adapters.base import check_ties
from converter.adapters.merged import BLOCK_BYTES, RECENT
from converter.adapters.names import PREFIX, WEIGHT, adapted_modules
from converter.config import make_model
from converter.plan import list_names
from converter.sources import Source
from formats.arrays import as_bytes
from formats.dtypes import MODEL_DTYPES
from formats.errors import UserError
from formats.folder import Folder
from formats.spec import DTYPES, Array, TensorSpec, dtype_name

_CHANGEABLE = {DTYPES[name]: name for name in MODEL_DTYPES}


@dataclass(frozen=True, slots=True)
class Survey:
    """An adapter that fits. `told` is what `conversion.json` says of it; `nbytes` those of each of its weights, in memory."""

    told: Mapping[str, Any]
    nbytes: Mapping[str, int]

    def memory(self, workers: int) -> int:
        """Bytes that merging holds at most: the adapters in use, and two blocks for each worker."""
        return sum(sorted(self.nbytes.values())[-RECENT:]) + workers * 2 * BLOCK_BYTES


def survey(adapter: Adapter, base: Source, folder: Folder) -> Survey:
    """Look at all of an adapter, which lies in `folder`, beside a base.

    Raises UserError for weights that the base does not have, that it uses twice, that have another shape, or that no change
    can be added to, and for changes that are no numbers.
    """
    specs = base.reader.specs
    if not adapter.names:
        raise UserError(f"the adapter `{folder.label}` changes no weights")
    check_ties(base, adapter.names)
    missing = sorted(adapter.names - specs.keys())
    if missing:
        raise UserError(
            f"the adapter `{folder.label}` changes {list_names(missing)}, which `{base.label}` does not have",
            hint=_trained_beside(missing, specs),
        )
    check_whole(adapter, base, folder)
    digest, nbytes = blake3(), dict[str, int]()
    for weight in sorted(adapter.names):
        delta = adapter.read(weight)
        _check(weight, specs[weight], delta)
        nbytes[weight] = sum(array.nbytes for array in _arrays(delta))
        digest.update(f"{weight}\0{delta.a.shape}{delta.b.shape}".encode())
        digest.update(struct.pack("<d", delta.scale))
        for array in _arrays(delta):
            digest.update(as_bytes(np.ascontiguousarray(array)))
    described = {field: _plain(value) for field, value in asdict(adapter.description).items()}
    return Survey({**folder.origin, **described, "weights": len(nbytes), "blake3": digest.hexdigest()}, nbytes)


def check_whole(adapter: Adapter, base: Source, folder: Folder) -> None:
    """Raise UserError where an adapter lacks weights that its configuration asks for: a lost file or pipeline stage."""
    candidates = _linear_layers(adapter, base) if adapter.all_linear else base.reader.specs
    lacking = [
        weight
        for weight in sorted(candidates)
        if weight not in adapter.names and len(base.reader.specs[weight].shape) == 2 and adapter.asks_for(weight)
    ]
    if lacking:
        raise UserError(
            f"the adapter `{folder.label}` asks for changes of {list_names(lacking)}, but its file holds none for them",
            hint="its file is not whole, or it was trained beside another model: a merge would be of a part alone",
        )


def _linear_layers(adapter: Adapter, base: Source) -> list[str]:
    """Weights that PEFT's `all-linear` means: by the family, or where it is not known, by the names that the adapter has in some
    layer."""
    config, specs = base.reference.config, base.reader.specs
    if config.get("model_type") in families.names():
        family = families.find(config["model_type"])
        model = make_model(family.CONFIG, config)
        every = (weight for place in adapted_modules(family.RULES, model, canonical=True) for weight in place.weights)
        return [weight for weight in every if weight in specs]
    ends = {_end(name) for name in adapter.names}
    return [name for name in specs if name.endswith(WEIGHT) and _end(name) in ends]


def _end(weight: str) -> str:
    """`q_proj` of `model.layers.0.self_attn.q_proj.weight`."""
    return weight.removesuffix(WEIGHT).rpartition(".")[2]


def _trained_beside(missing: Sequence[str], specs: Mapping[str, TensorSpec]) -> str:
    """Why weights that an adapter changes are not there: another prefix in their names, or another model."""
    for name in missing:
        before, layers, tail = name.partition("layers.")
        found = next((one for one in specs if layers and one.endswith(f".{layers}{tail}")), None)
        if found:
            new = f'n.replace("{PREFIX}{before}", "{PREFIX}{found.partition(layers)[0]}", 1)'
            return (
                f"the base calls that weight `{found}`: the adapter was trained beside `AutoModel`, or a model of text and "
                f"images; rename its tensors `n` to `{new}`"
            )
    return "it was trained beside another model"


def _plain(value: Any) -> Any:
    """As JSON gives it back: what a run says is held against what an interrupted one wrote down."""
    return list(cast("tuple[Any]", value)) if isinstance(value, tuple) else value


def _arrays(delta: Delta) -> list[Array]:
    return [delta.a, delta.b] if delta.magnitude is None else [delta.a, delta.b, delta.magnitude]


def _check(name: str, spec: TensorSpec, delta: Delta) -> None:
    shape = delta.b.shape[0], delta.a.shape[-1]
    if delta.a.ndim != 2 or delta.b.ndim != 2 or delta.a.shape[0] != delta.b.shape[1]:
        raise UserError(
            f"the adapter of `{name}` has A of shape {list(delta.a.shape)} and B of {list(delta.b.shape)}, which do not multiply",
            hint="the adapter is damaged",
        )
    if spec.shape != shape:
        raise UserError(
            f"`{name}` has shape {list(spec.shape)}, its adapter is for one of {list(shape)}",
            hint="it was trained beside another model",
        )
    if delta.magnitude is not None and delta.magnitude.shape != shape[:1]:
        raise UserError(
            f"the adapter of `{name}` has a magnitude of shape {list(delta.magnitude.shape)}, it should be [{shape[0]}]",
            hint="the adapter is damaged",
        )
    if not all(np.isfinite(array).all() for array in (*_arrays(delta), np.float64(delta.scale))):
        raise UserError(f"the adapter of `{name}` holds values that are not finite", hint="its training failed, or it is damaged")
    if spec.dtype not in _CHANGEABLE:
        raise UserError(
            f"`{name}` is {dtype_name(spec.dtype)}, to which nothing can be added",
            hint=f"merge into a base in {', '.join(_CHANGEABLE.values())}",
        )
