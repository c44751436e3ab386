"""Checkpoints of adapters: what is trained and nothing else, and which model it was trained beside.

Knows no method: what is trained is what asks for gradients. The model itself stays where it was and is loaded from there
again; its fingerprint says whether it still is the same.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

from megatron.core.dist_checkpointing.mapping import ShardedObject

from converter.adapters.adapter import METHODS, Base, Description, base_name
from converter.adapters.files import DESCRIPTION, is_peft
from converter.adapters.fingerprint import fingerprint
from converter.adapters.megatron import check_method, read_description
from converter.plan import as_stored
from converter.reference import UnknownModelError
from converter.sources import open_source
from formats.detect import Format, detect
from formats.errors import UserError
from formats.folder import LocalFolder
from formats.home import expanded
from formats.iterations import find_iteration
from formats.torch_dist import TorchDistReader
from trainer.checkpoints import live
from trainer.config import RunConfig
from trainer.model import unwrap
from trainer.parallel import from_first_rank

CONTENT = {"non_homogeneous_layers": True}
"""What megatron-core's modules are told: layers keep their numbers in the names, since not all need have adapters."""

_CHANGES = ("method", "dim", "alpha", "use_rslora", "canonical")
"""What, on resume, would make another model of the same tensors."""


def described(peft: Any, base: Base | None) -> Description:
    """`adapter.json` for a method of `trainer.peft` or one's own."""
    known = {name: getattr(peft, name) for name in ("dim", "alpha", "use_rslora", "canonical", "dropout") if hasattr(peft, name)}
    names = {name: tuple(getattr(peft, name, ())) for name in ("target_modules", "exclude_modules")}
    name = type(peft).__name__
    return Description(method=name.lower() if name.lower() in METHODS else name, base=base, **known, **names)


def method_of(found: Description) -> Any:
    """The method that a description tells of. UserError for one of somebody's own, which only its code knows."""
    from trainer.peft import DoRA, LoRA  # noqa: PLC0415 - bring megatron-core's layers

    check_method(found, label=DESCRIPTION)
    method = {"lora": LoRA, "dora": DoRA}[found.method]
    names = {name: list(getattr(found, name)) for name in ("target_modules", "exclude_modules")}
    return method(dim=found.dim, alpha=found.alpha, use_rslora=found.use_rslora, canonical=found.canonical, **names)


def find(source: str) -> Description | None:
    """What an adapter's checkpoint says of it; None for a checkpoint of a whole model."""
    folder = open_source(source, or_hub=True)
    if detect(folder) is not Format.TORCH_DIST:
        return None
    iteration = find_iteration(folder)
    return read_description(iteration) if iteration.has(DESCRIPTION) else None


def base_of(config: RunConfig, resumed: Path | None) -> str | None:
    """Where the weights are that adapters are trained beside: as the settings say, else as the resumed checkpoint does.

    UserError where a checkpoint of adapters is resumed without `peft`, with another method than its own, or the reverse.
    """
    named = config.checkpoint.pretrained_checkpoint or getattr(config.model, "pretrained_from", None)
    if resumed is None:
        return named
    found = _read(resumed)
    _check_method(found, config, resumed)
    return named or (found.base.name if found and found.base else None)


def identify(source: str | None, config: RunConfig, resumed: Path | None) -> Base | None:
    """The base by name and fingerprint, on all ranks. UserError where it is not the one that the resumed checkpoint names, and
    where adapters would be saved beside weights that are nowhere."""
    if source is None:
        if config.checkpoint.save:
            raise UserError(
                "adapters cannot be saved beside random weights, which are nowhere to be found again",
                hint="name the model with `checkpoint.pretrained_checkpoint`",
            )
        return None
    base = Base(base_name(source), from_first_rank(lambda: _fingerprint(source)))
    before = found.base if resumed and (found := _read(resumed)) else None
    if before and before.fingerprint and base.fingerprint and before.fingerprint != base.fingerprint:
        raise _another_base(str(resumed), before, base)
    return base


def _fingerprint(source: str) -> str:
    """Nothing for a model of one's own, of which nobody knows which tensors it has."""
    try:
        return fingerprint(source)
    except UnknownModelError:
        return ""


def _another_base(source: str, theirs: Base, ours: Base) -> UserError:
    return UserError(
        f"`{source}` was trained beside `{theirs.name}` (fingerprint {theirs.fingerprint[:12]}…), and `{ours.name}` is another "
        f"model (fingerprint {ours.fingerprint[:12]}…)",
        hint="set `checkpoint.pretrained_checkpoint` to where that model is now",
    )


def _read(folder: Path) -> Description | None:
    return read_description(LocalFolder(folder)) if (folder / DESCRIPTION).is_file() else None


def _check_method(found: Description | None, config: RunConfig, resumed: Path | str) -> None:
    if (found is None) != (config.peft is None):
        what, hint = ("adapters", "`peft`") if found else ("a whole model", "`peft=none`")
        raise UserError(f"`{resumed}` holds {what}, and `peft` is `{_name(config.peft)}`", hint=f"resume with {hint} as it was")
    if found is None:
        return
    ours = described(config.peft, None)
    for name in _CHANGES:
        if getattr(found, name) != getattr(ours, name):
            raise UserError(
                f"`{resumed}` was trained with `{name}` `{getattr(found, name)}`, and `peft` has `{getattr(ours, name)}`",
                hint="resume with the same method, or start anew with another `checkpoint.save`",
            )


def _name(peft: Any) -> str:
    return "none" if peft is None else type(peft).__name__


def only_trained(state: Mapping[str, Any], chunk: Any) -> dict[str, Any]:
    """Of a chunk's sharded state, what asks for gradients, and the scales that FP8 with a history cannot find again."""
    trained = {id(one) for one in chunk.parameters() if one.requires_grad}
    config = getattr(chunk, "config", None)
    scales = bool(getattr(config, "fp8", None)) and config.fp8_recipe == "delayed"
    return {
        name: leaf
        for name, leaf in state.items()
        if (scales if isinstance(leaf, ShardedObject) else id(getattr(leaf, "data", None)) in trained)
    }


def put(chunk: Any, loaded: Mapping[str, Any]) -> None:
    """Put what was loaded into a chunk whose other parameters stay as they are."""
    inner = unwrap(chunk)
    answer = inner.load_state_dict(loaded, strict=False)
    trained = {name for name, one in inner.named_parameters() if one.requires_grad}
    assert not answer.unexpected_keys, answer.unexpected_keys
    assert not trained.intersection(answer.missing_keys), sorted(trained.intersection(answer.missing_keys))


def check_same(chunks: Sequence[Any], resumed: Path) -> None:
    """UserError where a checkpoint holds other adapters than were attached: megatron-core would leave out, and say nothing, what
    has no place."""
    with closing(TorchDistReader(LocalFolder(resumed))) as reader:
        live.account(live.local_weights(chunks, only_trained), as_stored(reader.specs), str(resumed), hint=_SAME)


_SAME = "`peft` should have the rank and the modules that it was trained with"


def load(chunks: Sequence[Any], source: str, config: RunConfig, base: Base | None) -> str:
    """Adapters to start from, into chunks they were attached to; answers what was loaded, for people.

    Raises UserError for what is no checkpoint of adapters, or of another method, shape or base.
    """
    source = expanded(source)
    if is_peft(LocalFolder(Path(source))):
        raise UserError(
            f"`{source}` is a folder of PEFT's",
            hint=f"make a checkpoint of it: `mbconvert adapter-to-mcore {source} DST --base …`, and name that",
        )
    with closing(TorchDistReader(LocalFolder(Path(source)))) as reader:
        found = read_description(reader.folder)
        _check_method(found, config, source)
        if base and base.fingerprint and found.base and found.base.fingerprint not in {"", base.fingerprint}:
            raise _another_base(source, found.base, base)
        reader.check(reader.specs)
        locals_, tensor_plans = live.local_weights(chunks, only_trained), as_stored(reader.specs)
        live.account(locals_, tensor_plans, source, hint=_SAME)
        for local in locals_:
            live.fill(local, tensor_plans[local.name], reader)
        unnamed = "" if found.base and found.base.fingerprint else ", which does not say what it was trained beside"
        return f"loaded {len(tensor_plans)} of {len(reader.specs)} tensors of adapters from `{source}`{unnamed}"
