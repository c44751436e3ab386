"""The model that an adapter is merged into, opened: whichever way it is kept, it is read under Hugging Face names.

So merging needs no code for fused tensors: a Megatron checkpoint is split by the row table that exports it.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from converter import families, reference
from converter.checks import check_dimensions, check_zero
from converter.config import make_model
from converter.plan import Piece, TensorPlan, check_dtypes
from converter.recognize import refuse_unfit
from converter.sources import Source, huggingface_source, megatron_source
from converter.views import megatron_view
from formats.detect import Format, detect
from formats.errors import UserError
from formats.folder import Folder
from formats.huggingface import HuggingFaceReader
from formats.spec import Array, Reader, Region
from formats.torch_dist import TorchDistReader


class PlannedReader:
    """Tensors that are made of another reader's; none is cast, and copies cover each."""

    def __init__(self, reader: Reader, tensor_plans: Mapping[str, TensorPlan]) -> None:
        self._reader, self._makings = reader, tensor_plans
        self.specs = {name: tensor_plan.spec for name, tensor_plan in tensor_plans.items()}

    def read(self, name: str, region: Region, out: Array) -> None:
        for copy, there, rows in Piece(self._makings[name], region).copies():
            self._reader.read(copy.source, there, out[rows])

    def close(self) -> None:
        self._reader.close()


def open_base(folder: Folder, given: Folder | None) -> Source:
    """A model in either format; `given` is a folder with a `config.json` for a checkpoint that carries none.

    Raises UserError for what is neither format, or no model.
    """
    if detect(folder) is not Format.TORCH_DIST:
        if given:
            raise UserError("`--hf-config` is for a Megatron checkpoint", hint=f"`{folder.label}` has its own `config.json`")
        reader = HuggingFaceReader(folder, any_dtype=True)
        source = huggingface_source(reader)
        _check_names(source)
        check_dtypes(reader.specs)
        check_dimensions(reader.specs)
        return source
    checkpoint = TorchDistReader(folder)
    origin = reference.find(checkpoint, given)
    side = megatron_view(checkpoint, origin)
    for name in side.zero:
        check_zero(checkpoint, name)
    return megatron_source(checkpoint, folder, origin, PlannedReader(side.reader, side.tensor_plans))


def _check_names(source: Source) -> None:
    """Raise UserError for weights that are recognized as no plain ones of their family, where it is supported."""
    config = source.reference.config
    if config.get("model_type") in families.names():
        family = families.find(config["model_type"])
        refuse_unfit(source.reader.specs, config, family, make_model(family.CONFIG, config), label=source.label)


def check_ties(source: Source, names: Collection[str]) -> None:
    """Raise UserError if only one use of a tensor that the model uses twice would change."""
    config = source.reference.config
    for name, other in _ties(config):
        changed = sorted({name, other} & set(names))
        if changed:
            raise UserError(
                f"the adapter changes `{changed[0]}`, but `config.json` ties `{name}` to `{other}`: one tensor for two uses",
                hint="untie the base first: store both, and set `tie_word_embeddings` to false in its `config.json`",
            )


def _ties(config: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Pairs of names that stand for one tensor, where the family is known."""
    if config.get("model_type") not in families.names():
        return []
    family = families.find(config["model_type"])
    model = make_model(family.CONFIG, config)
    tied = [rule for rule in family.RULES if rule.tied_to and not rule.when(model)]
    return [(name, rule.tied_to) for rule in tied for name in rule.names(0)[1]]
