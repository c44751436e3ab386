"""Checkpoints of adapters: the trained parameters alone, and the base model that they belong to.

Works for any method of `peft`: a parameter is trained if it requires a gradient. The base model is not saved; it is loaded from
its source again, and its fingerprint tells whether it is still the same.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

from megatron.core.dist_checkpointing.mapping import ShardedObject

from converter.adapter_files import DESCRIPTION, is_peft
from converter.adapters.adapter import METHODS, Base, Description, base_name
from converter.adapters.fingerprint import fingerprint
from converter.adapters.megatron import check_method, read_description
from converter.hybrid import GPT
from converter.plan import as_stored
from converter.reference import UnknownModelError
from converter.sources import open_source
from formats.detect import detect, open_megatron
from formats.errors import UserError
from formats.folder import LocalFolder
from formats.home import expanded
from formats.iterations import find_iteration
from trainer.checkpoints import live
from trainer.collectives import from_first_rank
from trainer.config import RunConfig
from trainer.model import unwrap

CONTENT = {"non_homogeneous_layers": True}
"""The option of megatron-core's modules that keeps layer numbers in the names, since not all layers need have adapters."""

_CHANGES = ("method", "dim", "alpha", "use_rslora", "canonical")
"""Settings that, changed on resume, would make another model of the same tensors."""


def describe(peft: Any, base: Base | None, *, layout: str = GPT) -> Description:
    """Return the content of `adapter.json` for a method of `trainer.peft`, or for one's own."""
    settings = {
        name: getattr(peft, name) for name in ("dim", "alpha", "use_rslora", "canonical", "dropout") if hasattr(peft, name)
    }
    names = {name: tuple(getattr(peft, name, ())) for name in ("target_modules", "exclude_modules")}
    name = type(peft).__name__
    return Description(method=name.lower() if name.lower() in METHODS else name, base=base, layout=layout, **settings, **names)


def method_of(description: Description) -> Any:
    """Return the method that a description names. Raises UserError for a method that is not of `trainer.peft`."""
    from trainer.peft import DoRA, LoRA  # noqa: PLC0415 - bring megatron-core's layers

    check_method(description, label=DESCRIPTION)
    method = {"lora": LoRA, "dora": DoRA}[description.method]
    names = {name: list(getattr(description, name)) for name in ("target_modules", "exclude_modules")}
    sizes = {name: getattr(description, name) for name in ("dim", "alpha", "use_rslora", "canonical")}
    return method(**sizes, **names)


def find(source: str) -> Description | None:
    """Return the description in a checkpoint of adapters; None for a checkpoint of a whole model."""
    folder = open_source(source, or_hub=True)
    if not detect(folder).is_megatron:
        return None
    iteration = find_iteration(folder)
    return read_description(iteration) if iteration.has(DESCRIPTION) else None


def base_of(config: RunConfig, resumed: Path | None) -> str | None:
    """Return the source of the base model's weights: that of the settings, else that of the resumed checkpoint.

    Raises UserError if a checkpoint of adapters is resumed without `peft` or with another method, or one of a whole model with
    `peft`.
    """
    source = config.checkpoint.pretrained_checkpoint or getattr(config.model, "pretrained_from", None)
    if resumed is None:
        return source
    saved = _read(resumed)
    _check_method(saved, config.peft, resumed)
    return source or (saved.base.name if saved and saved.base else None)


def identify(source: str | None, *, saves: bool, resumed: Path | None) -> Base | None:
    """Return the base model by name and fingerprint, on all ranks; None for random weights.

    Raises UserError if it is not the one that the resumed checkpoint names, and if adapters of random weights would be saved.
    """
    if source is None:
        if saves:
            raise UserError(
                "adapters of random weights cannot be saved: the base model could not be loaded again",
                hint="name the model with `checkpoint.pretrained_checkpoint`",
            )
        return None
    base = Base(base_name(source), from_first_rank(lambda: _fingerprint(source)))
    before = saved.base if resumed and (saved := _read(resumed)) else None
    if before and before.fingerprint and base.fingerprint and before.fingerprint != base.fingerprint:
        raise _another_base(str(resumed), before, base)
    return base


def _fingerprint(source: str) -> str:
    """Return the fingerprint of a model; empty for one that no family describes."""
    try:
        return fingerprint(source)
    except UnknownModelError:
        return ""


def _another_base(source: str, theirs: Base, ours: Base) -> UserError:
    return UserError(
        f"`{source}` was trained with the base model `{theirs.name}` (fingerprint {theirs.fingerprint[:12]}…), and "
        f"`{ours.name}` is another model (fingerprint {ours.fingerprint[:12]}…)",
        hint="set `checkpoint.pretrained_checkpoint` to where that model is now",
    )


def _read(folder: Path) -> Description | None:
    return read_description(LocalFolder(folder)) if (folder / DESCRIPTION).is_file() else None


def _check_method(saved: Description | None, peft: Any, resumed: Path | str) -> None:
    if (saved is None) != (peft is None):
        content, hint = ("adapters", "`peft`") if saved else ("a whole model", "`peft=none`")
        raise UserError(f"`{resumed}` holds {content}, and `peft` is `{_name(peft)}`", hint=f"resume with {hint} as it was")
    if saved is None:
        return
    ours = describe(peft, None)
    for name in _CHANGES:
        if getattr(saved, name) != getattr(ours, name):
            raise UserError(
                f"`{resumed}` was trained with `{name}` `{getattr(saved, name)}`, and `peft` has `{getattr(ours, name)}`",
                hint="resume with the same method, or start anew with another `checkpoint.save`",
            )


def _name(peft: Any) -> str:
    return "none" if peft is None else type(peft).__name__


def only_trained(state: Mapping[str, Any], chunk: Any) -> dict[str, Any]:
    """Return the trained parameters of a chunk's sharded state, and the scales of FP8 with a history, which are not computed
    again."""
    trained = {id(parameter) for parameter in chunk.parameters() if parameter.requires_grad}
    config = getattr(chunk, "config", None)
    scales = bool(getattr(config, "fp8", None)) and config.fp8_recipe == "delayed"
    return {
        name: leaf
        for name, leaf in state.items()
        if (scales if isinstance(leaf, ShardedObject) else id(getattr(leaf, "data", None)) in trained)
    }


def put(chunk: Any, loaded: Mapping[str, Any]) -> None:
    """Load the trained parameters into a chunk; its other parameters do not change."""
    inner = unwrap(chunk)
    keys = inner.load_state_dict(loaded, strict=False)
    trained = {name for name, parameter in inner.named_parameters() if parameter.requires_grad}
    assert not keys.unexpected_keys, keys.unexpected_keys
    assert not trained.intersection(keys.missing_keys), sorted(trained.intersection(keys.missing_keys))


def check_same(chunks: Sequence[Any], resumed: Path) -> None:
    """Raise UserError if a checkpoint holds other adapters than were attached: megatron-core would ignore the others silently."""
    _check_layout(_read(resumed), chunks, resumed)
    with closing(open_megatron(LocalFolder(resumed))) as reader:
        live.check_names_and_shapes(live.local_weights(chunks, only_trained), as_stored(reader.specs), str(resumed), hint=_SAME)


def _check_layout(saved: Description | None, chunks: Sequence[Any], source: Path | str) -> None:
    """Raise UserError if adapters are of layers in another layout than the model's."""
    ours = getattr(chunks[0].config, "layout", GPT)
    if saved is not None and saved.layout != ours:
        raise UserError(
            f"`{source}` has adapters of the layout `{saved.layout}`, and `model.layout` is `{ours}`",
            hint=f"set `model.layout={saved.layout}`",
        )


_SAME = "`peft` should have the rank and the modules that it was trained with"


def load(chunks: Sequence[Any], source: str, *, peft: Any, base: Base | None) -> str:
    """Load adapters to start from into chunks that have adapters; return a line for people.

    Raises UserError if `source` is not a checkpoint of adapters, or has another method, shape or base.
    """
    source = expanded(source)
    if is_peft(LocalFolder(Path(source))):
        raise UserError(
            f"`{source}` is a PEFT adapter",
            hint=f"convert it first: `mbconvert adapter-to-mcore {source} DST --base …`, and name DST",
        )
    with closing(open_megatron(LocalFolder(Path(source)))) as reader:
        saved = read_description(reader.folder)
        _check_method(saved, peft, source)
        _check_layout(saved, chunks, source)
        if base and base.fingerprint and saved.base and saved.base.fingerprint not in {"", base.fingerprint}:
            raise _another_base(source, saved.base, base)
        reader.check(reader.specs)
        locals_, tensor_plans = live.local_weights(chunks, only_trained), as_stored(reader.specs)
        live.check_names_and_shapes(locals_, tensor_plans, source, hint=_SAME)
        for local in locals_:
            live.fill(local, tensor_plans[local.name], reader)
        unnamed = "" if saved.base and saved.base.fingerprint else ", which does not name its base model"
        return f"loaded {len(tensor_plans)} of {len(reader.specs)} tensors of adapters from `{source}`{unnamed}"
