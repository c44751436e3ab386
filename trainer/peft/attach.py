"""A method applied to a model: its own parameters frozen, what the method adds found, named and counted.

Knows how ranks hold a model. Knows no particular method and no optimizer.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.tensor_parallel import param_is_not_tensor_parallel_duplicate
from megatron.core.transformer.module import param_is_not_shared

from formats.errors import UserError
from trainer import device
from trainer.model import unwrap
from trainer.peft.adapter_layer import Adapter
from trainer.peft.peft import PEFT
from trainer.peft.targets import check_used, chosen, wanted


@dataclass(frozen=True, slots=True)
class Attached:
    """What is trained of a model, over all ranks."""

    method: str
    trained: int
    parameters: int
    """Of the whole model, what is trained included."""

    modules: int

    def __str__(self) -> str:
        share = 100 * self.trained / self.parameters
        return (
            f"{self.method}: {_count(self.trained)} of {_count(self.parameters)} parameters are trained ({share:.2f} %), "
            f"{self.modules} modules"
        )


def _count(number: int) -> str:
    for unit, name, digits in ((10**12, "T", 2), (10**9, "B", 2), (10**6, "M", 1)):
        if number >= unit:
            return f"{number / unit:.{digits}f} {name}"
    return str(number)


@dataclass
class _Found:
    """What one rank saw while it changed its modules."""

    used: set[str] = field(default_factory=set)
    """Patterns that fit a module."""

    names: set[str] = field(default_factory=set)
    changed: set[str] = field(default_factory=set)
    error: tuple[str, str] | None = None


def attach(chunks: Sequence[Any], peft: PEFT, *, seed: int = 1234) -> Attached:
    """Freeze the model and let the method change the modules it chooses. All ranks call this, after weights were loaded and
    before the chunks are wrapped.

    First values are the same at every layout. UserError, on all ranks, for names that fit no module, modules that the method
    cannot change, and a method that adds nothing.
    """
    _freeze(chunks)
    found = _Found()
    try:
        for chunk in chunks:
            _transform(chunk, peft, list(module_names(chunk)), found, seed)
    except UserError as error:
        found.error = (str(error.args[0]), error.hint)
    modules = _agree(found, peft)
    for chunk in chunks:
        _let_gradients_start(chunk)
    return _counted(chunks, type(peft).__name__, modules)


def attach_without_values(chunks: Sequence[Any], peft: PEFT) -> None:
    """The same modules in one rank's chunks on torch's meta device, where no parameter has a value. No rank is asked."""
    _freeze(chunks)
    for chunk in chunks:
        _transform(chunk, peft, list(module_names(chunk)), _Found(), seed=None)


def module_names(chunk: Any) -> Iterator[tuple[str, str, torch.nn.Module]]:
    """Every module of a chunk: its name in the whole model, its name in the chunk, itself.

    Layers and experts count from 0 in each chunk, and know which they are in the model.
    """
    numbers: dict[str, int] = {}
    for local, module in chunk.named_modules():
        if (number := getattr(module, "layer_number", None)) is not None and re.search(r"(^|\.)layers\.\d+$", local):
            numbers[local] = number - 1
        for at in range(len(getattr(module, "local_experts", ()))):
            numbers[f"{local}.local_experts.{at}"] = at + module.ep_group.rank() * module.num_local_experts
        yield _global_name(local, numbers), local, module


def _global_name(local: str, numbers: dict[str, int]) -> str:
    parts = local.split(".")
    heads = (".".join(parts[: at + 1]) for at in range(len(parts)))
    return ".".join(str(numbers.get(head, part)) for head, part in zip(heads, parts, strict=True))


def trainable(chunks: Sequence[Any]) -> Iterator[tuple[str, torch.nn.Parameter]]:
    """What is trained on this rank, under its name in the whole model."""
    for chunk in chunks:
        for name, _, module in module_names(unwrap(chunk)):
            for own, parameter in module.named_parameters(recurse=False):
                if parameter.requires_grad:
                    yield f"{name}.{own}", parameter


def _freeze(chunks: Sequence[Any]) -> None:
    for chunk in chunks:
        chunk.requires_grad_(requires_grad=False)
        for module in chunk.modules():
            if hasattr(module, "expert_bias"):
                module.frozen_expert_bias = True  # megatron-core's router would move it without any gradient


def _transform(chunk: Any, peft: PEFT, named: list[tuple[str, str, Any]], found: _Found, seed: int | None) -> None:
    """Change what the method chooses. Without a seed, what it adds gets no first values."""
    for name, local, module in named:
        names = (name, *peft.aliases(name))
        found.names.update(names)
        found.used |= chosen((*peft.target_modules, *peft.exclude_modules), names)
        if not wanted(name, names[1:], peft.target_modules, peft.exclude_modules):
            continue
        new = peft.transform(module, name)
        if new is not module:
            parent, _, last = local.rpartition(".")
            setattr(chunk.get_submodule(parent), last, new)
        for one in new.modules():
            if isinstance(one, Adapter) and seed is not None:
                one.reset_parameters(_generator(name, seed))
        found.changed.add(name)


def _generator(name: str, seed: int) -> torch.Generator:
    """Numbers that depend on a module's name in the whole model and the seed alone."""
    digest = hashlib.sha256(f"{seed} {name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7]))


def _agree(here: _Found, peft: PEFT) -> int:
    """How many modules changed. What one rank found wrong is an error on all of them; a pattern must fit a module on any."""
    told: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(told, here)
    for one in told:
        if one.error:
            raise UserError(one.error[0], hint=one.error[1])
    used, names, changed = (set().union(*(getattr(one, what) for one in told)) for what in ("used", "names", "changed"))
    check_used("peft.target_modules", peft.target_modules, used, names)
    check_used("peft.exclude_modules", peft.exclude_modules, used, names)
    return len(changed)


def _let_gradients_start(chunk: Any) -> None:
    """Recomputed layers get gradients only where their input asks for some, and a frozen embedding asks for none. Elsewhere it
    is cheaper not to go back below the first trained parameter."""
    embedding = getattr(chunk, "embedding", None)
    recomputed = getattr(getattr(chunk, "config", None), "recompute_granularity", None) is not None
    if embedding is not None and recomputed and any(one.requires_grad for one in chunk.parameters()):
        embedding.register_forward_hook(_with_gradient)


def _with_gradient(_module: Any, _args: Any, output: torch.Tensor) -> torch.Tensor:
    return output.requires_grad_() if torch.is_grad_enabled() else output


def _counted(chunks: Sequence[Any], method: str, modules: int) -> Attached:
    trained, parameters = count(chunks)
    if not trained:
        raise UserError(f"`{method}` adds no parameter that could be trained", hint="add one in `transform`")
    return Attached(method, trained, parameters, modules)


def count(chunks: Sequence[Any]) -> tuple[int, int]:
    """Trained parameters, and all of them: summed over the ranks that hold different parts. All ranks call this."""
    counts = torch.zeros(2, dtype=torch.int64)
    for parameter in (one for chunk in chunks for one in chunk.parameters()):
        if _counts_here(parameter):
            counts += torch.tensor([parameter.numel() * parameter.requires_grad, parameter.numel()])
    counts = counts.to(device.current())
    dist.all_reduce(counts)
    trained, parameters = counts.tolist()
    return trained, parameters


def _counts_here(parameter: torch.Tensor) -> bool:
    """Is this the one rank of those that hold the same?"""
    expert = not getattr(parameter, "allreduce", True)
    copies = (
        parallel_state.get_expert_data_parallel_rank()
        if expert
        else parallel_state.get_data_parallel_rank(with_context_parallel=True)
    )
    groups = parallel_state.get_tensor_model_parallel_group(), parallel_state.get_expert_tensor_parallel_group()
    return copies == 0 and param_is_not_shared(parameter) and param_is_not_tensor_parallel_duplicate(parameter, *groups)
