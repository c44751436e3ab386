"""Explain why a checkpoint could not be written or read, and what to do about it.

Uses error numbers, classes, names and shapes, never the texts of torch and megatron-core, which change between releases.
"""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories
from torch.distributed.checkpoint.api import CheckpointException

from formats.disk import free_space
from formats.errors import UserError, format_untrusted
from formats.faults import code_location, fault

_AGAIN = "start again with the same command: the run goes on from its last checkpoint"
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_REFUSED = {errno.EACCES, errno.EPERM, errno.EROFS, errno.EEXIST, errno.ENOTDIR}
_ERROR_NUMBER = re.compile(r"\[Errno (\d+)\]")


def not_saved(error: BaseException, folder: Path, *, last_good: str) -> UserError:
    """Return the error for a save to `folder` that failed; `last_good` names the last good checkpoint.

    All ranks get a CheckpointException; then all return the error of rank 0.
    """
    cause: list[Any] = [_cause(error)]
    if isinstance(error, CheckpointException):
        dist.broadcast_object_list(cause, src=0)
    reason, hint = cause[0]
    return UserError(f"saving `{folder}` failed: {reason} ({free_space(folder)}); {last_good}", hint=hint)


def _cause(error: BaseException) -> tuple[str, str]:
    """Return the reason and a hint."""
    if not isinstance(error, CheckpointException):
        return _describe(error), _hint([error])
    causes = [(rank, *failure) for rank, failure in error.failures.items()]
    reasons = "; ".join(f"rank {rank}: {_describe(cause, trace)}" for rank, cause, trace in causes)
    return reasons, _hint([cause for _, cause, _ in causes])


def _describe(error: BaseException, trace: Any = None) -> str:
    number = _number(error)
    if number:
        return os.strerror(number)
    location = code_location(trace or error.__traceback__)
    return f"{fault(error)}{f' in {location}' if location else ''}"


def _number(error: BaseException) -> int | None:
    """Return the operating system's error number, which the processes of torch's writer pass on as `[Errno 28]`."""
    for cause in (error, error.__cause__, error.__context__):
        if isinstance(cause, OSError) and cause.errno:
            return cause.errno
    match = _ERROR_NUMBER.search(str(error))
    return int(match[1]) if match else None


def _hint(errors: Iterable[BaseException]) -> str:
    errors = list(errors)
    numbers = {_number(error) for error in errors}
    if numbers & _FULL:
        return f"make room and {_AGAIN}"
    if numbers & _REFUSED:
        return f"let this user write there, or choose another `checkpoint.save`; then {_AGAIN}"
    if any(isinstance(error, ImportError) for error in errors):
        return "install that package on all hosts: `pip install 'mbtools[train]'`"
    if all(type(error) is RuntimeError for error in errors):  # torch's writer, which drops the error number
        room = "make room, or raise the limit on the size of files (`ulimit -f`): the writer gives no reason"
        return f"{room}; then {_AGAIN}"
    return f"correct what is named, then {_AGAIN}"


def not_resumed(error: BaseException, sharded_state: dict[str, Any], folder: Path) -> UserError:
    """Return the error for a checkpoint that megatron-core could not load into `wanted`, a sharded state dict."""
    difference = _difference(sharded_state, folder)
    if difference:
        hint = "it has another model or optimizer, or was saved without `checkpoint.save_optim` or `save_rng`"
        return UserError(f"`{folder}` cannot be resumed from: {difference}", hint=hint)
    causes = [cause for cause, _ in error.failures.values()] if isinstance(error, CheckpointException) else [error]
    return UserError(
        f"`{folder}` cannot be resumed from: a file of it is damaged or cannot be read ({_describe(causes[0])})",
        hint=f"`mbconvert inspect --check {folder}` names the file; resume from another checkpoint",
    )


def _difference(sharded_state: dict[str, Any], folder: Path) -> str:
    """Describe the first tensor that the checkpoint lacks, or has in another shape; empty if there is none."""
    try:
        metadata = dist_checkpointing.load_tensors_metadata(str(folder)).values()
        saved = {tensor.key: tuple(tensor.global_shape) for tensor in metadata}
    except (CheckpointException, dist_checkpointing.core.CheckpointingException, OSError, ValueError, KeyError, TypeError):
        return ""
    apply_factories(sharded_state)
    of_run = {leaf.key: tuple(leaf.global_shape) for leaf in nested_values(sharded_state) if isinstance(leaf, ShardedTensor)}
    for name, shape in of_run.items():
        if name not in saved:
            return f"it has no `{name}`, which this run has"
        if saved[name] != shape:
            return f"`{name}` is `{format_untrusted(list(saved[name]))}` there, and `{format_untrusted(list(shape))}` in this run"
    return ""
