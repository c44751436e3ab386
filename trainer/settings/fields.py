"""Resolve names of settings, such as `train.train_iters`, to fields of a run's dataclasses; suggest a name for an unknown one.

Works on any dataclass by its fields and annotations, and on the free mappings in them (`model.hf_config`). Knows no grammar
and no files.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cache
from typing import Any, Optional, get_type_hints

from formats.errors import UserError, format_untrusted
from trainer.settings import groups
from trainer.settings.defaults import forget_explicit, note_explicit
from trainer.settings.values import MismatchError, convert, expected

ALIASES = {
    "dataset.seq_length": "dataset.sequence_length",
    "dataset.seq_len": "dataset.sequence_length",
    "dataset.max_length": "dataset.sequence_length",
    "dataset.max_seq_length": "dataset.sequence_length",
    "dataset.data_path": "dataset.blend",
    "train.seq_length": "dataset.sequence_length",
    "train.seq_len": "dataset.sequence_length",
    "train.max_steps": "train.train_iters",
    "train.num_steps": "train.train_iters",
    "train.steps": "train.train_iters",
    "train.batch_size": "train.global_batch_size",
    "train.local_batch_size": "train.micro_batch_size",
    "train.per_device_train_batch_size": "train.micro_batch_size",
    "train.learning_rate": "optimizer.lr",
    "train.max_grad_norm": "optimizer.clip_grad",
    "train.seed": "rng.seed",
    "model.tp": "model.tensor_model_parallel_size",
    "model.pp": "model.pipeline_model_parallel_size",
    "model.vpp": "model.virtual_pipeline_model_parallel_size",
    "model.cp": "model.context_parallel_size",
    "model.ep": "model.expert_model_parallel_size",
    "model.etp": "model.expert_tensor_parallel_size",
    "model.sp": "model.sequence_parallel",
    "optimizer.learning_rate": "optimizer.lr",
    "optimizer.max_lr": "optimizer.lr",
    "optimizer.beta1": "optimizer.adam_beta1",
    "optimizer.beta2": "optimizer.adam_beta2",
    "optimizer.eps": "optimizer.adam_eps",
    "optimizer.grad_clip": "optimizer.clip_grad",
    "optimizer.max_grad_norm": "optimizer.clip_grad",
    "optimizer.name": "optimizer.optimizer",
    "scheduler.warmup_steps": "scheduler.lr_warmup_iters",
    "scheduler.warmup_ratio": "scheduler.lr_warmup_fraction",
    "scheduler.decay_steps": "scheduler.lr_decay_iters",
    "scheduler.name": "scheduler.lr_decay_style",
    "validation.eval_steps": "validation.eval_interval",
    "logger.logging_steps": "logger.log_interval",
    "logger.log_every_n_steps": "logger.log_interval",
    "checkpoint.folder": "checkpoint.save",
    "checkpoint.interval": "checkpoint.save_interval",
    "checkpoint.save_steps": "checkpoint.save_interval",
    "checkpoint.save_total_limit": "checkpoint.keep_last",
    "checkpoint.resume_from": "checkpoint.load",
    "peft.r": "peft.dim",
    "peft.rank": "peft.dim",
    "peft.lora_alpha": "peft.alpha",
    "peft.lora_dropout": "peft.dropout",
}
"""Names used by transformers, torchtitan, NeMo and PEFT. A section's own setting of that name takes precedence."""

_MANY = 20


@cache
def annotations(section: type) -> Mapping[str, Any]:
    """Return the settings of a dataclass and their annotations; Any where a class's annotations cannot be resolved."""
    try:
        hints = get_type_hints(section)
    except NameError:
        hints = {}
    return {field.name: _kind(field, hints) for field in dataclasses.fields(section) if field.init and field.name[0] != "_"}


def _kind(field: dataclasses.Field[Any], hints: Mapping[str, Any]) -> Any:
    """Return a field's annotation, made optional where the default is None, which megatron-core does not always annotate."""
    kind = hints.get(field.name, Any)
    return kind if kind is Any or field.default is not None else Optional[kind]  # noqa: UP045 - `|` refuses what is no type


def is_section(value: Any) -> bool:
    """Tell whether a value has settings of its own."""
    return dataclasses.is_dataclass(value) and not isinstance(value, type)


@dataclass(frozen=True)
class FieldPath:
    """A field of a dataclass, or a key of a free mapping. `name` is the full dotted name."""

    holder: Any
    key: str
    name: str

    @property
    def free(self) -> bool:
        """Whether it is a key of a mapping, to which keys may be added."""
        return isinstance(self.holder, dict)

    @property
    def known(self) -> bool:
        """Whether the setting exists."""
        return self.key in (self.holder if self.free else annotations(type(self.holder)))

    @property
    def value(self) -> Any:
        """The current value; None for a missing key."""
        return self.holder.get(self.key) if self.free else getattr(self.holder, self.key)

    @property
    def kind(self) -> Any:
        """The field's annotation."""
        return Any if self.free else annotations(type(self.holder))[self.key]

    def set(self, value: Any) -> None:
        """Set the value. Raises UserError where it does not fit the annotation, or names no choice of a config group."""
        if self.name in groups.GROUPS:
            self._set_group(value)
            return
        fitting = self.converted(value)
        if self.free:
            self.holder[self.key] = fitting
            return
        try:
            setattr(self.holder, self.key, fitting)
        except dataclasses.FrozenInstanceError:
            raise UserError(
                f"`{self.name}` cannot be set: `{type(self.holder).__name__}` is a frozen dataclass",
                hint="define the class without `frozen=True`",
            ) from None
        note_explicit(self.holder, self.key)

    def _set_group(self, value: Any) -> None:
        chosen, rest = groups.split_group(self.name, value, self.value)
        setattr(self.holder, self.key, chosen)
        for key, setting in rest.items():
            field_path(self.holder, f"{self.name}.{key}").set(setting)

    def converted(self, value: Any) -> Any:
        """Return the value converted to the annotated type. Raises UserError where it does not fit."""
        if is_section(self.value):
            raise UserError(
                f"`{self.name}` is a section, it cannot be `{format_untrusted(value)}`", hint=f"{_listed(self.name, self.value)}"
            )
        try:
            return convert(value, self.kind)
        except MismatchError:
            text = "null" if value is None else format_untrusted(value)
            hint = "write it in quotes" if fits_text(self.kind) and isinstance(value, (bool, int, float)) else ""
            raise UserError(f"`{self.name}` is `{text}`, it should be {expected(self.kind)}", hint=hint) from None

    def reset(self) -> None:
        """Reset a field to its default, or delete a key. Raises UserError for a field without a default."""
        if self.free:
            del self.holder[self.key]
            return
        field = next(field for field in dataclasses.fields(self.holder) if field.name == self.key)
        default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
        if default is dataclasses.MISSING:
            raise UserError(f"`{self.name}` has no default to go back to", hint="set it to what it should be")
        setattr(self.holder, self.key, default)
        forget_explicit(self.holder, self.key)


def fits_text(kind: Any) -> bool:
    """Tell whether any text fits an annotation."""
    try:
        return kind is not Any and convert("any text", kind) == "any text"
    except MismatchError:
        return False


def field_path(config: Any, name: str, *, new: bool = False) -> FieldPath:
    """Return the field or key that `name` stands for.

    `new` allows a key that a free mapping does not have yet, and creates the mappings that lead to it. Raises UserError, with the
    nearest name, for an unknown setting.
    """
    keys = _current_name(config, name).split(".")
    holder = config
    for depth, key in enumerate(keys):
        path = FieldPath(holder, key, ".".join(keys[: depth + 1]))
        if not path.known and not (new and path.free):
            raise _unknown(config, path)
        if depth + 1 == len(keys):
            return path
        holder = holder.setdefault(key, {}) if path.free and new else path.value
        if not is_section(holder) and not isinstance(holder, dict):
            first = f"choose first: {' or '.join(f'`{path.name}={choice}`' for choice in groups.GROUPS.get(path.name, ()))}"
            raise UserError(
                f"`{path.name}` is `{format_untrusted(holder)}`, there is no `{keys[depth + 1]}` in it",
                hint=first if path.name in groups.GROUPS else f"set `{path.name}` as a whole",
            )
    raise AssertionError(name)


def _current_name(config: Any, name: str) -> str:
    section, _, key = name.partition(".")
    holder = getattr(config, section, None)
    return name if not is_section(holder) or key in annotations(type(holder)) else ALIASES.get(name, name)


def _unknown(config: Any, path: FieldPath) -> UserError:
    if path.free:
        return UserError(f"there is no `{path.name}`", hint=f"{_near(path.key, path.holder)}`+{path.name}=…` adds it")
    if path.holder is config:
        return _unknown_section(config, path.key)
    same = [name for name in every_name(config) if name.rpartition(".")[2] == path.key]
    near = same or [
        f"{path.name.rpartition('.')[0]}.{nearest}" for nearest in get_close_matches(path.key, annotations(type(path.holder)), 1)
    ]
    hint = _did_you_mean(near) or _listed(path.name.rpartition(".")[0], path.holder)
    return UserError(f"unknown setting `{path.name}`", hint=hint)


def _unknown_section(config: Any, key: str) -> UserError:
    same = [name for name in every_name(config) if name.rpartition(".")[2] == key]
    if same:
        return UserError(f"unknown setting `{key}`", hint=_did_you_mean(same))
    return UserError(
        f"unknown section `{key}`", hint=f"{_near(key, annotations(type(config)))}sections are: {', '.join(_sections(config))}"
    )


def _sections(config: Any) -> list[str]:
    return [name for name in annotations(type(config)) if is_section(getattr(config, name))]


def _near(key: str, names: Mapping[str, Any]) -> str:
    near = _did_you_mean(get_close_matches(key, names, 1))
    return f"{near} " if near else ""


def _did_you_mean(names: list[str]) -> str:
    return f"did you mean {' or '.join(f'`{name}`' for name in names[:3])}?" if names else ""


def _listed(name: str, section: Any) -> str:
    names = list(annotations(type(section)))
    if len(names) > _MANY:
        return f"`mbtrain show RECIPE` prints every setting of `{name}`"
    return f"settings of `{name}` are: {', '.join(names)}"


def every_name(config: Any) -> Iterator[str]:
    """Yield the names of all settings."""
    for section in annotations(type(config)):
        value = getattr(config, section)
        if is_section(value):
            yield from (f"{section}.{name}" for name in annotations(type(value)))
        else:
            yield section
