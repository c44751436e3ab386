"""`adapter_config.json` as PEFT 0.21 writes it: what it requests, read and written.

Fields that do not change what a trained adapter computes are known by name. Every other field must be empty, so that an unknown
feature is refused instead of ignored.
"""

from __future__ import annotations

import json
from collections.abc import Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, cast

from converter.adapter_files import FLAG, NUMBER, PEFT_CONFIG, RANK, SIZE, STRING, FieldType, list_of, table_of
from converter.adapters import pattern
from converter.adapters.adapter import Description, scale
from converter.adapters.pattern import Budget
from formats.errors import UserError, format_untrusted
from formats.folder import Folder
from formats.json_objects import read_json

ALL_LINEAR = "all-linear"

_READ = {
    "peft_type", "r", "lora_alpha", "lora_dropout", "use_rslora", "use_dora", "target_modules", "exclude_modules",
    "layers_to_transform", "layers_pattern", "rank_pattern", "alpha_pattern", "base_model_name_or_path", "init_lora_weights",
    "fan_in_fan_out", "target_parameters",
}  # fmt: skip
_HARMLESS = {
    "auto_mapping", "revision", "task_type", "inference_mode", "peft_version", "eva_config", "megatron_core",
    "qalora_group_size", "runtime_config",
}  # fmt: skip
_MOST_PATTERNS = 1 << 14
_EMPTY: tuple[Any, ...] = (None, False, "none", {}, [])

_PLAIN_STARTS = (None, True, False, "gaussian", "eva", "orthogonal", "mica")
"""Initializations that keep the base model's weights. PiSSA, OLoRA, CorDA, LoftQ and LoRA-GA change them."""

_PROMPT_METHODS = {
    "PROMPT_TUNING", "MULTITASK_PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING", "ADAPTION_PROMPT", "CPT", "XLORA", "POLY",
}  # fmt: skip
"""Methods that change a model's inputs or activations, and have no equivalent change of its weights."""


@dataclass(frozen=True, slots=True)
class PeftConfig:
    """A LoRA as PEFT describes it. Modules are named as in the Hugging Face model: `model.layers.0.self_attn.q_proj`."""

    r: int
    lora_alpha: float
    use_rslora: bool
    use_dora: bool
    lora_dropout: float
    target_modules: str | tuple[str, ...]
    """Names or endings of names; a single string is a regular expression, or `all-linear`."""

    exclude_modules: str | tuple[str, ...] = ()
    layers_to_transform: tuple[int, ...] = ()
    layers_pattern: tuple[str, ...] = ()
    rank_pattern: Mapping[str, int] = field(default_factory=dict[str, int])
    alpha_pattern: Mapping[str, float] = field(default_factory=dict[str, float])
    base: str = ""
    target_parameters: tuple[str, ...] = ()
    """Names of parameters or endings of names: `mlp.experts.gate_up_proj`, `mlp.gate.weight`."""

    parameters: Mapping[str, str] = field(default_factory=dict[str, str])
    """For modules whose weights PEFT has in a parameter of all experts, that parameter: see `converter.adapters.experts`."""

    fan_in_fan_out: bool = False
    """Whether the weight that PEFT changed last is stored as [in, out]. PEFT goes by the model's modules, not by this."""

    _budget: Budget = field(default_factory=Budget, repr=False, compare=False)

    @property
    def method(self) -> str:
        return "dora" if self.use_dora else "lora"

    def rank(self, module: str) -> int:
        return self._by_pattern(self.rank_pattern, self._key(module), self.r)

    def alpha(self, module: str) -> float:
        return self._by_pattern(self.alpha_pattern, self._key(module), self.lora_alpha)

    def _key(self, module: str) -> str:
        """Return the name that PEFT matches with patterns: a parameter's if that is what it targets."""
        names = (self.parameters.get(module, f"{module}.weight"), module)
        return next((name for name in names if self.targets_parameter(name)), module)

    def scale(self, module: str) -> float:
        """Return the factor of B · A of a module."""
        return scale(self.alpha(module), self.rank(module), use_rslora=self.use_rslora)

    def targets(self, module: str) -> bool:
        """Return whether PEFT builds an adapter for a module.

        Source: `check_target_module_exists` in PEFT's `tuners_utils.py`.
        """
        if self.targets_parameter(self.parameters.get(module, f"{module}.weight")):
            return True
        if self._matches(self.exclude_modules, module):
            return False
        if isinstance(self.target_modules, str) or module in self.target_modules:
            return self._is_all_linear() or self._matches(self.target_modules, module)
        return self._matches(self.target_modules, module) and self._in_layers(module)

    def targets_parameter(self, name: str) -> bool:
        """Return whether PEFT builds an adapter for a parameter, by `target_parameters`.

        Source: `_inject_parameters` in PEFT's `tuners_utils.py`.
        """
        return self._matches(self.target_parameters, name)

    def _is_all_linear(self) -> bool:
        return isinstance(self.target_modules, str) and self.target_modules.lower() == ALL_LINEAR

    def _matches(self, wanted: str | tuple[str, ...], module: str) -> bool:
        """Match a list of names by a whole name or its ending, a single string as a regular expression."""
        if isinstance(wanted, str):
            with _name_the_file():
                return bool(wanted) and pattern.fullmatch(wanted, module, self._budget)
        return any(module == name or module.endswith(f".{name}") for name in wanted)

    def _in_layers(self, module: str) -> bool:
        if not self.layers_to_transform:
            return True
        prefixes = [rf"(?:^|.*?\.){layers}" for layers in self.layers_pattern] or [r".*?\.[^.]*"]
        with _name_the_file():
            matches = (pattern.match(rf"{prefix}\.(?P<idx>\d+)\.", module, self._budget) for prefix in prefixes)
            span = next((match for match in matches if match is not None), ())
        return bool(span) and int(module[span[-2] : span[-1]]) in self.layers_to_transform

    def _by_pattern[Number: (int, float)](self, patterns: Mapping[str, Number], module: str, default: Number) -> Number:
        """Return the number of the first pattern that matches the name or its ending.

        Source: `get_pattern_key` in PEFT's `utils/other.py`.
        """
        return next((number for key, number in patterns.items() if self._matches_end(key, module)), default)

    def _matches_end(self, key: str, module: str) -> bool:
        whole = rf"(.*\.)?({key})$"
        with _name_the_file():
            if pattern.is_plain(key):
                return pattern.compiled(whole).match(module) is not None
            return pattern.match(whole, module, self._budget) is not None


@contextmanager
def _name_the_file() -> Generator[None]:
    """Say in which file a refused pattern is."""
    try:
        yield
    except UserError as error:
        raise UserError(f"`{PEFT_CONFIG}` holds {error.args[0]}", hint=error.hint) from error


def read(folder: Folder) -> PeftConfig:
    """Read `adapter_config.json`. Raises UserError for a damaged file, and for anything but a plain LoRA or DoRA."""
    document = read_json(folder, PEFT_CONFIG)
    if document.get("peft_type") != "LORA":
        raise UserError(
            f"`peft_type` in `{PEFT_CONFIG}` is `{format_untrusted(document.get('peft_type'))}`, which is not supported",
            hint=_suggest(document),
        )
    _refuse_features(document)
    return PeftConfig(
        r=_get(document, "r", RANK, 8),
        lora_alpha=_get(document, "lora_alpha", NUMBER, 8),
        use_rslora=_get(document, "use_rslora", FLAG, default=False),
        use_dora=_get(document, "use_dora", FLAG, default=False),
        fan_in_fan_out=_get(document, "fan_in_fan_out", FLAG, default=False),
        lora_dropout=_get(document, "lora_dropout", NUMBER, 0.0),
        target_modules=_get_names(document, "target_modules"),
        exclude_modules=_get_names(document, "exclude_modules"),
        target_parameters=tuple(_get(document, "target_parameters", _NAMES, cast("list[str]", []))),
        layers_to_transform=_get_layers(document),
        layers_pattern=as_tuple(_get_names(document, "layers_pattern")),
        rank_pattern=_get(document, "rank_pattern", _RANKS, cast("dict[str, int]", {})),
        alpha_pattern=_get(document, "alpha_pattern", _ALPHAS, cast("dict[str, float]", {})),
        base=_get(document, "base_model_name_or_path", STRING, ""),
    )


_RANKS = table_of(RANK, "an object of ranks", most=_MOST_PATTERNS)
_ALPHAS = table_of(NUMBER, "an object of numbers", most=_MOST_PATTERNS)
_NAMES = list_of(STRING, "a string or a list of strings")
_LAYERS = list_of(SIZE, "a layer's number or a list of them")


def _suggest(document: Mapping[str, Any]) -> str:
    """Return what to do with an adapter of another method."""
    if "fine_tune_type" in document or "lora_parameters" in document:
        return "MLX wrote it: `mlx_lm.fuse` merges it into its model"
    if str(document.get("peft_type")) in _PROMPT_METHODS:
        return "LORA is, with `use_dora` or without; this method adds to a model's inputs and cannot be merged into its weights"
    return "LORA is, with `use_dora` or without; merge others with PEFT (`merge_and_unload`) and convert the merged model"


def _refuse_features(document: Mapping[str, Any]) -> None:
    for name, value in document.items():
        if name not in _READ | _HARMLESS and value not in _EMPTY:
            raise UserError(
                f"`{PEFT_CONFIG}` has `{format_untrusted(name)}: {format_untrusted(value)}`, which is not supported",
                hint="merge the adapter with PEFT (`merge_and_unload`) and convert the merged model",
            )
    start = document.get("init_lora_weights")
    if start not in _PLAIN_STARTS:
        raise UserError(
            f"`{PEFT_CONFIG}` has `init_lora_weights: {format_untrusted(start)}`, with which PEFT changes the base model's "
            "weights too",
            hint="save it with PEFT's `path_initial_model_for_weight_conversion`, which makes a plain LoRA of it",
        )


def _get[T](document: Mapping[str, Any], name: str, kind: FieldType, default: T) -> T:
    """Return a field; the default if it is absent or null. Raises UserError for another type."""
    value = document.get(name)
    if value is None:
        return default
    kind.check(name, value, source=f"`{PEFT_CONFIG}`", hint="the file is damaged")
    return value


def _get_names(document: Mapping[str, Any], name: str) -> str | tuple[str, ...]:
    value = document.get(name)
    return value if isinstance(value, str) else tuple(sorted(_get(document, name, _NAMES, cast("list[str]", []))))


def as_tuple(names: str | tuple[str, ...]) -> tuple[str, ...]:
    """Return a single string as a tuple of one."""
    return (names,) if isinstance(names, str) else names


def _get_layers(document: Mapping[str, Any]) -> tuple[int, ...]:
    value = document.get("layers_to_transform")
    layers = [value] if SIZE.accepts(value) else _get(document, "layers_to_transform", _LAYERS, [])
    return tuple(cast("list[int]", layers))


def encode(description: Description, targets: Mapping[str, Any], *, fan_in_fan_out: bool) -> bytes:
    """Return `adapter_config.json`. `targets`: see `converter.adapters.layout`; `fan_in_fan_out`: weights are [in, out].

    PEFT has no dropout for parameters, and trained adapters need none.
    """
    alpha = description.alpha
    document = {
        "base_model_name_or_path": (description.base.name if description.base else "") or None,
        "bias": "none",
        "fan_in_fan_out": fan_in_fan_out,
        "inference_mode": True,
        "lora_alpha": int(alpha) if alpha == int(alpha) else alpha,
        "lora_dropout": 0.0 if targets.get("target_parameters") else description.dropout,
        "peft_type": "LORA",
        "r": description.dim,
        "task_type": "CAUSAL_LM",
        "use_dora": description.method == "dora",
        "use_rslora": description.use_rslora,
        **targets,
    }
    return (json.dumps(document, indent=2, sort_keys=True) + "\n").encode()


def choose_targets(modules: Sequence[str], *, layers: int, others: Iterable[str] | None = None) -> dict[str, Any]:
    """Return `target_modules` and `layers_to_transform` for exactly these modules of a model of `layers` layers.

    Last names if all of them are in the same layers and none of the `others`, modules without an adapter, has such a name there,
    or anywhere; otherwise whole names. None for `others` that are not known.

    >>> choose_targets(["model.layers.0.mlp.up_proj", "model.layers.2.mlp.up_proj"], layers=4)
    {'layers_to_transform': [0, 2], 'target_modules': ['up_proj']}
    """
    layers_of = _layers_by_last_name(modules)
    distinct = {frozenset(numbers) for numbers in layers_of.values()}
    elsewhere = _layers_by_last_name(others or ())
    shared = any(numbers & layers_of.get(name, set()) for name, numbers in elsewhere.items())
    if others is not None and len(distinct) > 1 and not elsewhere.keys() & layers_of.keys():
        return {"layers_to_transform": None, "target_modules": sorted(layers_of)}
    if shared or len(distinct) > 1 or -1 in next(iter(distinct)):
        return {"layers_to_transform": None, "target_modules": sorted(modules)}
    chosen = sorted(next(iter(distinct)))
    return {"layers_to_transform": None if len(chosen) == layers else chosen, "target_modules": sorted(layers_of)}


def _layers_by_last_name(modules: Iterable[str]) -> dict[str, set[int]]:
    """Return the numbers of the layers that have modules of each last name; -1 for a module outside the layers."""
    layers_of: dict[str, set[int]] = {}
    for module in modules:
        parts = module.split(".")
        layers_of.setdefault(parts[-1], set()).add(next((int(part) for part in parts if part.isdecimal()), -1))
    return layers_of
