"""Load what Transformer Engine keeps of FP8's delayed scaling without running code from a checkpoint.

Its modules pickle their scales and histories of largest values into `_extra_state`, and unpickle them with `pickle.loads`, which
runs whatever a file names; from 2.20 on it refuses to, unless an environment variable allows that. Here the variable is set
only while its modules use the unpickler below, which builds tensors and recipes and nothing else.
"""

from __future__ import annotations

import io
import os
import pickle
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from importlib import import_module
from importlib.util import find_spec
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch

from formats.errors import UserError

_UNPICKLING = ("transformer_engine.pytorch.module.base", "transformer_engine.pytorch.ops.op")
"""The modules of Transformer Engine that call `pickle.loads` on an extra state."""

_ALLOW = "NVTE_ALLOW_UNSAFE_PICKLE_EXTRA_STATE"

_RECIPES = {
    "transformer_engine.common.recipe": {
        "DelayedScaling", "Float8CurrentScaling", "Float8BlockScaling", "MXFP8BlockScaling", "NVFP4BlockScaling",
        "Format", "_FormatHelper", "MMParams", "QParams",
    },
    "megatron.core.extensions.transformer_engine": {"TEDelayedScaling"},
}  # fmt: skip
_STORAGES = {("torch.storage", "_load_from_bytes"), ("megatron.core.safe_globals", "safe_load_from_bytes")}
"""How a storage is pickled: as torch does, and as megatron-core has it do."""

_TENSORS = {"torch._utils": {"_rebuild_tensor_v2"}, "collections": {"OrderedDict"}}


@contextmanager
def safe_unpickling() -> Iterator[None]:
    """Have Transformer Engine's modules load only extra states that hold FP8 state, inside this context.

    Raises UserError, from the load, for an extra state that names anything else.
    """
    with ExitStack() as patches:
        if find_spec("transformer_engine") is not None:
            patches.enter_context(mock.patch.dict(os.environ, {_ALLOW: "1"}))
            for name in _UNPICKLING:
                module = import_module(name)
                patches.enter_context(mock.patch.object(module, "pickle", SimpleNamespace(loads=loads, dumps=pickle.dumps)))
        yield


def loads(data: bytes) -> Any:
    """Return the object of a pickled extra state. Raises UserError for one that is more than FP8 state."""
    return _Unpickler(io.BytesIO(data)).load()


class _Unpickler(pickle.Unpickler):
    """An unpickler that finds tensors, recipes, and no other class or function."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _STORAGES:
            return _storage
        if name in _RECIPES.get(module, ()) or name in _TENSORS.get(module, ()):
            return super().find_class(module, name)
        raise _refusal(f"names `{module}.{name}`")


def _storage(data: bytes) -> Any:
    """Return a tensor's storage from bytes, as `torch.storage._load_from_bytes` does, but without running code."""
    try:
        return torch.load(io.BytesIO(data), weights_only=True)
    except pickle.UnpicklingError:
        raise _refusal("holds a storage that names something else") from None


def _refusal(fault: str) -> UserError:
    return UserError(
        f"an `_extra_state` of the checkpoint {fault}, which is not part of Transformer Engine's FP8 state",
        hint="loading it could run code; start from the weights alone with `checkpoint.pretrained_checkpoint`",
    )
