"""`adapter_config.json` as PEFT 0.21 writes it: what it says of a LoRA, and what it asks for that nothing else could do.

Fields that do not change what a trained adapter computes are known by name; every other field must be empty, so that a
feature this does not know is refused and not left out.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, cast

from converter.adapters import pattern
from converter.adapters.description import Description, is_number, scale
from converter.adapters.files import PEFT_CONFIG
from converter.adapters.pattern import Budget
from formats.errors import UserError, format_untrusted
from formats.folder import Folder
from formats.json_objects import read_json
from formats.spec import is_size

FILE = PEFT_CONFIG
ALL_LINEAR = "all-linear"

_READ = {
    "peft_type", "r", "lora_alpha", "lora_dropout", "use_rslora", "use_dora", "target_modules", "exclude_modules",
    "layers_to_transform", "layers_pattern", "rank_pattern", "alpha_pattern", "base_model_name_or_path", "init_lora_weights",
}  # fmt: skip
_HARMLESS = {
    "auto_mapping", "revision", "task_type", "inference_mode", "peft_version", "eva_config", "megatron_core",
    "qalora_group_size", "runtime_config",
}  # fmt: skip
_MOST_PATTERNS = 1 << 14
_EMPTY: tuple[Any, ...] = (None, False, "none", {}, [])

_PLAIN_STARTS = (None, True, False, "gaussian", "eva", "orthogonal", "mica")
"""Beginnings of training that leave the base model's weights as they are. PiSSA, OLoRA, CorDA, LoftQ and LoRA-GA change them."""


@dataclass(frozen=True, slots=True)
class PeftConfig:
    """A LoRA as PEFT describes it. Modules are named as in the Hugging Face model: `model.layers.0.self_attn.q_proj`."""

    r: int
    lora_alpha: float
    use_rslora: bool
    use_dora: bool
    lora_dropout: float
    target_modules: str | tuple[str, ...]
    """Names or their ends; as one text, a regular expression, or `all-linear`."""

    exclude_modules: str | tuple[str, ...] = ()
    layers_to_transform: tuple[int, ...] = ()
    layers_pattern: tuple[str, ...] = ()
    rank_pattern: Mapping[str, int] = field(default_factory=dict[str, int])
    alpha_pattern: Mapping[str, float] = field(default_factory=dict[str, float])
    base: str = ""
    _budget: Budget = field(default_factory=Budget, repr=False, compare=False)

    @property
    def method(self) -> str:
        return "dora" if self.use_dora else "lora"

    def rank(self, module: str) -> int:
        return self._by_pattern(self.rank_pattern, module, self.r)

    def alpha(self, module: str) -> float:
        return self._by_pattern(self.alpha_pattern, module, self.lora_alpha)

    def scale(self, module: str) -> float:
        """What B · A of a module is multiplied by."""
        return scale(self.alpha(module), self.rank(module), use_rslora=self.use_rslora)

    def targets(self, module: str) -> bool:
        """Would PEFT build an adapter there? Source: `check_target_module_exists` in PEFT's `tuners_utils.py`."""
        if self._named(self.exclude_modules, module):
            return False
        if isinstance(self.target_modules, str) or module in self.target_modules:
            return self._is_all_linear() or self._named(self.target_modules, module)
        return self._named(self.target_modules, module) and self._in_layers(module)

    def _is_all_linear(self) -> bool:
        return isinstance(self.target_modules, str) and self.target_modules.lower() == ALL_LINEAR

    def _named(self, wanted: str | tuple[str, ...], module: str) -> bool:
        """By a whole name or its end; by one text as a regular expression."""
        if isinstance(wanted, str):
            with _named_file():
                return bool(wanted) and pattern.fullmatch(wanted, module, self._budget)
        return any(module == one or module.endswith(f".{one}") for one in wanted)

    def _in_layers(self, module: str) -> bool:
        if not self.layers_to_transform:
            return True
        before = [rf"(?:^|.*?\.){one}" for one in self.layers_pattern] or [r".*?\.[^.]*"]
        with _named_file():
            found = (pattern.match(rf"{one}\.(?P<idx>\d+)\.", module, self._budget) for one in before)
            first = next((one for one in found if one is not None), ())
        return bool(first) and int(module[first[-2] : first[-1]]) in self.layers_to_transform

    def _by_pattern[Number: (int, float)](self, patterns: Mapping[str, Number], module: str, otherwise: Number) -> Number:
        """Source: `get_pattern_key` in PEFT's `utils/other.py`: the first pattern that matches the name, or its end, counts."""
        return next((number for one, number in patterns.items() if self._ends_with(one, module)), otherwise)

    def _ends_with(self, one: str, module: str) -> bool:
        whole = rf"(.*\.)?({one})$"
        with _named_file():
            if pattern.is_plain(one):
                return pattern.compiled(whole).match(module) is not None
            return pattern.match(whole, module, self._budget) is not None


@contextmanager
def _named_file() -> Generator[None]:
    try:
        yield
    except UserError as error:
        raise UserError(f"`{FILE}` holds {error.args[0]}", hint=error.hint) from error


def read(folder: Folder) -> PeftConfig:
    """The configuration in a folder; UserError for what is broken, and by name for what no LoRA and no DoRA is."""
    found = read_json(folder, FILE)
    if found.get("peft_type") != "LORA":
        raise UserError(
            f"`peft_type` in `{FILE}` is `{format_untrusted(found.get('peft_type'))}`, which is not supported",
            hint=_instead(found),
        )
    _refuse_features(found)
    return PeftConfig(
        r=_get(found, "r", _is_rank, 8),
        lora_alpha=_get(found, "lora_alpha", is_number, 8),
        use_rslora=_get(found, "use_rslora", _is_flag, default=False),
        use_dora=_get(found, "use_dora", _is_flag, default=False),
        lora_dropout=_get(found, "lora_dropout", is_number, 0.0),
        target_modules=_names(found, "target_modules"),
        exclude_modules=_names(found, "exclude_modules"),
        layers_to_transform=_layers(found),
        layers_pattern=_several(_names(found, "layers_pattern")),
        rank_pattern=_get(found, "rank_pattern", _is_table_of(_is_rank), cast("dict[str, int]", {})),
        alpha_pattern=_get(found, "alpha_pattern", _is_table_of(is_number), cast("dict[str, float]", {})),
        base=_get(found, "base_model_name_or_path", lambda value: isinstance(value, str), ""),
    )


_UNMERGEABLE = {
    "PROMPT_TUNING",
    "MULTITASK_PROMPT_TUNING",
    "P_TUNING",
    "PREFIX_TUNING",
    "ADAPTION_PROMPT",
    "CPT",
    "XLORA",
    "POLY",
}


def _instead(found: Mapping[str, Any]) -> str:
    """What to do about an adapter of another kind."""
    if "fine_tune_type" in found or "lora_parameters" in found:
        return "MLX wrote it: `mlx_lm.fuse` merges it into its model"
    if str(found.get("peft_type")) in _UNMERGEABLE:
        return "LORA is, with `use_dora` or without; this kind adds to what a model reads and cannot be merged into its weights"
    return "LORA is, with `use_dora` or without; merge others with PEFT (`merge_and_unload`) and convert the merged model"


def _refuse_features(found: Mapping[str, Any]) -> None:
    for name, value in found.items():
        if name not in _READ | _HARMLESS and value not in _EMPTY:
            raise UserError(
                f"`{FILE}` has `{format_untrusted(name)}: {format_untrusted(value)}`, which is not supported",
                hint="merge the adapter with PEFT (`merge_and_unload`) and convert the merged model",
            )
    start = found.get("init_lora_weights")
    if start not in _PLAIN_STARTS:
        raise UserError(
            f"`{FILE}` has `init_lora_weights: {format_untrusted(start)}`, with which PEFT changes the base model's weights too",
            hint="save it with PEFT's `path_initial_model_for_weight_conversion`, which makes a plain LoRA of it",
        )


def _get[T](found: Mapping[str, Any], name: str, check: Callable[[Any], bool], default: T) -> T:
    """A field of the type that `check` wants; absent or null means the default."""
    value = found.get(name)
    if value is None:
        return default
    if not check(value):
        raise UserError(
            f"`{name}` in `{FILE}` is `{format_untrusted(value)}`, which is not what it should be", hint="the file is damaged"
        )
    return value


def _is_flag(value: Any) -> bool:
    return isinstance(value, bool)


def _is_rank(value: Any) -> bool:
    return is_size(value) and value > 0


def _is_table_of(check: Callable[[Any], bool]) -> Callable[[Any], bool]:
    def is_table(value: Any) -> bool:
        table = cast("dict[str, Any]", value) if isinstance(value, dict) else None
        return table is not None and len(table) <= _MOST_PATTERNS and all(check(one) for one in table.values())

    return is_table


def _is_list_of(check: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, list) and all(check(one) for one in cast("list[Any]", value))


def _names(found: Mapping[str, Any], name: str) -> str | tuple[str, ...]:
    value = found.get(name)
    if isinstance(value, str):
        return value
    listed: list[str] = _get(found, name, _is_list_of(lambda one: isinstance(one, str)), [])
    return tuple(sorted(listed))


def _several(names: str | tuple[str, ...]) -> tuple[str, ...]:
    return (names,) if isinstance(names, str) else names


def _layers(found: Mapping[str, Any]) -> tuple[int, ...]:
    value = found.get("layers_to_transform")
    if is_size(value):
        return (cast("int", value),)
    listed: list[int] = _get(found, "layers_to_transform", _is_list_of(is_size), [])
    return tuple(listed)


def make(description: Description, modules: Iterable[str], *, layers: int) -> bytes:
    """The document for an adapter of these modules of a model with that many layers. PEFT builds exactly those from it."""
    alpha = description.alpha
    document = {
        "base_model_name_or_path": (description.base.name if description.base else "") or None,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "lora_alpha": int(alpha) if alpha == int(alpha) else alpha,
        "lora_dropout": description.dropout,
        "peft_type": "LORA",
        "r": description.dim,
        "task_type": "CAUSAL_LM",
        "use_dora": description.method == "dora",
        "use_rslora": description.use_rslora,
        **choose(list(modules), layers=layers),
    }
    return (json.dumps(document, indent=2, sort_keys=True) + "\n").encode()


def choose(modules: Sequence[str], *, layers: int) -> dict[str, Any]:
    """`target_modules` and `layers_to_transform` for exactly these modules: their last names where those are in every layer
    or in the same layers, else their whole names."""
    inside: dict[str, set[int]] = {}
    for module in modules:
        parts = module.split(".")
        inside.setdefault(parts[-1], set()).add(next((int(part) for part in parts if part.isdecimal()), -1))
    taken = {frozenset(numbers) for numbers in inside.values()}
    if len(taken) > 1 or -1 in next(iter(taken)):
        return {"layers_to_transform": None, "target_modules": sorted(modules)}
    chosen = sorted(next(iter(taken)))
    return {"layers_to_transform": None if len(chosen) == layers else chosen, "target_modules": sorted(inside)}
