"""`adapter.json`: what an adapter is, beside its tensors. Lies in the iteration's folder of a Megatron checkpoint."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from math import isfinite
from pathlib import Path
from typing import Any, cast

from converter.adapters.files import DESCRIPTION
from formats.errors import UserError, format_untrusted
from formats.folder import Folder
from formats.home import expanded
from formats.json_objects import read_json
from formats.spec import is_size

FILE = DESCRIPTION
METHODS = ("lora", "dora")


@dataclass(frozen=True, slots=True)
class Base:
    """The model that an adapter was trained beside."""

    name: str
    """Where it lay, or its Hub id."""

    fingerprint: str
    """See `converter.adapters.fingerprint`; empty where nobody took it, as in PEFT's own files."""


def base_name(source: str | Path) -> str:
    """What a model is called that adapters stand beside: a folder here by its whole path, which holds in every other folder."""
    path = Path(expanded(source))
    return str(path.absolute()) if path.exists() else str(source)


@dataclass(frozen=True, slots=True)
class Description:
    """Method and numbers of an adapter."""

    method: str
    """`lora`, `dora`, or the class of a method of somebody's own."""

    dim: int = 0
    """The rank."""

    alpha: float = 0.0
    use_rslora: bool = False
    """Scaled by alpha / √rank instead of alpha / rank (arXiv:2312.03732)."""

    canonical: bool = False
    """Separate adapters for query, key, value, gate and up, as PEFT has them."""

    dropout: float = 0.0
    target_modules: tuple[str, ...] = ()
    exclude_modules: tuple[str, ...] = ()
    base: Base | None = None

    @property
    def scale(self) -> float:
        """What B · A is multiplied by."""
        return scale(self.alpha, self.dim, use_rslora=self.use_rslora)


def scale(alpha: float, dim: int, *, use_rslora: bool) -> float:
    """alpha / rank, or with `use_rslora` alpha / √rank: as PEFT counts it, in double precision."""
    return alpha / dim**0.5 if use_rslora else alpha / dim


def make(description: Description) -> bytes:
    """The document."""
    return (json.dumps(asdict(description), indent=2) + "\n").encode()


def read(folder: Folder) -> Description:
    """What an iteration's folder says of the adapter in it; UserError where it says nothing, or what is not understood."""
    if not folder.has(FILE):
        raise UserError(
            f"`{folder.label}` has no `{FILE}`, so it is no adapter",
            hint="an adapter is a folder with PEFT's `adapter_config.json`, or a checkpoint of a training run with `peft`",
        )
    found: dict[str, Any] = read_json(folder, FILE)
    _check(found, _FIELDS, f"`{FILE}`")
    if found.get("method") is None:
        raise UserError(f"`{FILE}` does not say of which `method` the adapter is")
    lists: dict[str, Any] = {name: tuple(found[name]) for name in ("target_modules", "exclude_modules") if name in found}
    told: dict[str, Any] = {**found, **lists, "base": _base(found.get("base"))}
    return Description(**told)


def _base(found: Any) -> Base | None:
    if found is None:
        return None
    if not isinstance(found, dict):
        raise UserError(f"`base` in `{FILE}` is `{format_untrusted(found)}`, which should be an object")
    told = cast("dict[str, Any]", found)
    _check(told, {"name": _is_text, "fingerprint": _is_text}, f"`base` of `{FILE}`")
    return Base(told.get("name", ""), told.get("fingerprint", ""))


def check_method(description: Description, *, label: str) -> None:
    """Raise UserError for an adapter of a method that has no place in PEFT's files and no rule for merging."""
    if description.method not in METHODS:
        raise UserError(
            f"`{label}` is an adapter of the method `{format_untrusted(description.method)}`, which only its author can convert",
            hint=f"supported are: {', '.join(METHODS)}",
        )
    if description.dim < 1:
        raise UserError(f"`dim` in `{FILE}` is {description.dim}, which should be the rank, 1 or more")


def _check(found: Mapping[str, Any], known: Mapping[str, Any], source: str) -> None:
    """Raise UserError for a field that is unknown or of another type."""
    for name, value in found.items():
        if name not in known:
            raise UserError(
                f"{source} has a field `{format_untrusted(name)}`, which is not known here",
                hint="a newer version may have written it: this one would leave out what it says",
            )
        if not known[name](value):
            raise UserError(f"`{name}` in {source} is `{format_untrusted(value)}`, which is not what it should be")


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_flag(value: Any) -> bool:
    return isinstance(value, bool)


def is_number(value: Any) -> bool:
    """A number that can be counted with."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1 << 53 and isfinite(value)


def _is_texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(text, str) for text in cast("list[Any]", value))


def _anything(_value: Any) -> bool:
    return True


_FIELDS = {
    "method": _is_text, "dim": is_size, "alpha": is_number, "use_rslora": _is_flag, "canonical": _is_flag,
    "dropout": is_number, "target_modules": _is_texts, "exclude_modules": _is_texts, "base": _anything,
}  # fmt: skip
assert set(_FIELDS) == {one.name for one in fields(Description)}
