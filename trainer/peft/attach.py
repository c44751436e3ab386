"""Apply a PEFT method to a model: freeze its parameters, let the method change modules, and name and count what is trained.

Works on the model chunks of every rank, for any method.
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
from trainer.peft.grouped import multiply_at_once
from trainer.peft.peft import PEFT
from trainer.peft.targets import check_used, matching_patterns, targeted_names


@dataclass(frozen=True, slots=True)
class Attached:
    """The figures of an attached method, over all ranks."""

    method: str
    trained: int
    parameters: int
    """Parameters of the whole model, with the trained ones."""

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
class _Transformed:
    """The patterns used, the names seen and the modules changed on one rank."""

    used: set[str] = field(default_factory=set)
    """Patterns that match a module."""

    names: set[str] = field(default_factory=set)
    changed: set[str] = field(default_factory=set)
    error: tuple[str, str] | None = None


def attach(chunks: Sequence[Any], peft: PEFT, *, seed: int = 1234) -> Attached:
    """Freeze the model, let the method change the modules it targets, and return the figures.

    All ranks call this, after the weights are loaded and before the chunks are wrapped. Initial values are the same at every
    parallel layout. Raises UserError, on all ranks, for patterns that match no module, modules that the method cannot change,
    and a method that adds no parameters.
    """
    _freeze(chunks)
    local = _Transformed()
    try:
        for chunk in chunks:
            _transform(chunk, peft, list(module_names(chunk)), local, seed)
    except UserError as error:
        local.error = (str(error.args[0]), error.hint)
    modules = _merge_ranks(local, peft)
    for chunk in chunks:
        _require_embedding_gradient(chunk)
        for module in chunk.modules():
            multiply_at_once(module)
    return _summarize(chunks, type(peft).__name__, modules)


def attach_on_meta(chunks: Sequence[Any], peft: PEFT) -> None:
    """Change the same modules in one rank's chunks on torch's meta device, where parameters have no values; no communication."""
    _freeze(chunks)
    for chunk in chunks:
        _transform(chunk, peft, list(module_names(chunk)), _Transformed(), seed=None)


def module_names(chunk: Any) -> Iterator[tuple[str, str, torch.nn.Module]]:
    """Yield every module of a chunk: its name in the whole model, its name in the chunk, and the module.

    In a chunk, layers and experts count from 0; their numbers in the whole model come from their attributes.
    """
    numbers: dict[str, int] = {}
    for local, module in chunk.named_modules():
        if (number := getattr(module, "layer_number", None)) is not None and re.search(r"(^|\.)layers\.\d+$", local):
            numbers[local] = number - 1
        for index in range(len(getattr(module, "local_experts", ()))):
            numbers[f"{local}.local_experts.{index}"] = index + module.ep_group.rank() * module.num_local_experts
        yield _global_name(local, numbers), local, module


def _global_name(local: str, numbers: dict[str, int]) -> str:
    parts = local.split(".")
    prefixes = (".".join(parts[: index + 1]) for index in range(len(parts)))
    return ".".join(str(numbers.get(prefix, part)) for prefix, part in zip(prefixes, parts, strict=True))


def trainable(chunks: Sequence[Any]) -> Iterator[tuple[str, torch.nn.Parameter]]:
    """Yield the trained parameters of this rank, by their names in the whole model."""
    for chunk in chunks:
        for name, _, module in module_names(unwrap(chunk)):
            for last, parameter in module.named_parameters(recurse=False):
                if parameter.requires_grad:
                    yield f"{name}.{last}", parameter


def _freeze(chunks: Sequence[Any]) -> None:
    for chunk in chunks:
        chunk.requires_grad_(requires_grad=False)
        for module in chunk.modules():
            if hasattr(module, "expert_bias"):
                module.frozen_expert_bias = True  # megatron-core's router would update it without a gradient


def _transform(chunk: Any, peft: PEFT, modules: list[tuple[str, str, Any]], local: _Transformed, seed: int | None) -> None:
    """Change the targeted modules, and record them in `local`. Without a seed, added parameters are not initialized."""
    for name, local_name, module in modules:
        names = (name, *peft.aliases(name))
        local.names.update(names)
        local.used |= matching_patterns((*peft.target_modules, *peft.exclude_modules), names)
        if not targeted_names(name, names[1:], peft.target_modules, peft.exclude_modules):
            continue
        new = peft.transform(module, name)
        if new is not module:
            parent, _, last = local_name.rpartition(".")
            setattr(chunk.get_submodule(parent), last, new)
        for added in new.modules():
            if isinstance(added, Adapter) and seed is not None:
                added.reset_parameters(_generator(name, seed))
        local.changed.add(name)


def _generator(name: str, seed: int) -> torch.Generator:
    """Return a generator whose seed depends only on `seed` and the module's name in the whole model."""
    digest = hashlib.sha256(f"{seed} {name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7]))


def _merge_ranks(local: _Transformed, peft: PEFT) -> int:
    """Return the number of changed modules over all ranks. Raises the first error of any rank on all ranks, and UserError for a
    pattern that matches a module on none."""
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, local)
    for rank in gathered:
        if rank.error:
            raise UserError(rank.error[0], hint=rank.error[1])
    used, names, changed = (set().union(*(getattr(rank, field) for rank in gathered)) for field in ("used", "names", "changed"))
    check_used("peft.target_modules", peft.target_modules, used, names)
    check_used("peft.exclude_modules", peft.exclude_modules, used, names)
    return len(changed)


def _require_embedding_gradient(chunk: Any) -> None:
    """Let the output of a frozen embedding require a gradient if layers are recomputed: a recomputed layer gets gradients only if
    its input requires them. Otherwise the backward pass ends at the first trained parameter, which is cheaper."""
    embedding = getattr(chunk, "embedding", None)
    recomputed = getattr(getattr(chunk, "config", None), "recompute_granularity", None) is not None
    if embedding is not None and recomputed and any(parameter.requires_grad for parameter in chunk.parameters()):
        embedding.register_forward_hook(_with_gradient)


def _with_gradient(_module: Any, _args: Any, output: torch.Tensor) -> torch.Tensor:
    return output.requires_grad_() if torch.is_grad_enabled() else output


def _summarize(chunks: Sequence[Any], method: str, modules: int) -> Attached:
    trained, parameters = count(chunks)
    if not trained:
        raise UserError(f"`{method}` adds no trainable parameter", hint="add one in `transform`")
    return Attached(method, trained, parameters, modules)


def count(chunks: Sequence[Any]) -> tuple[int, int]:
    """Return the number of trained parameters and of all parameters, over all ranks, without replicas. All ranks call this."""
    counts = torch.zeros(2, dtype=torch.int64)
    for parameter in (parameter for chunk in chunks for parameter in chunk.parameters()):
        if _is_owner(parameter):
            counts += torch.tensor([parameter.numel() * parameter.requires_grad, parameter.numel()])
    counts = counts.to(device.current())
    dist.all_reduce(counts)
    trained, parameters = counts.tolist()
    return trained, parameters


def _is_owner(parameter: torch.Tensor) -> bool:
    """Return whether this rank counts a parameter; of its replicas, one rank does."""
    expert = not getattr(parameter, "allreduce", True)
    copies = (
        parallel_state.get_expert_data_parallel_rank()
        if expert
        else parallel_state.get_data_parallel_rank(with_context_parallel=True)
    )
    groups = parallel_state.get_tensor_model_parallel_group(), parallel_state.get_expert_tensor_parallel_group()
    return copies == 0 and param_is_not_shared(parameter) and param_is_not_tensor_parallel_duplicate(parameter, *groups)
