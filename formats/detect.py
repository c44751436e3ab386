"""Detect the format of a folder (Hugging Face model, PEFT adapter, Megatron checkpoint) and open it.

The content decides, never the folder's own name. This module recognizes formats by their files; parsing those is left to the
readers.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Sequence
from enum import StrEnum

from formats import foreign
from formats.dcp_index import METADATA, read_index
from formats.errors import UserError
from formats.folder import FileRef, Folder, LocalFolder
from formats.huggingface import HuggingFaceReader
from formats.huggingface_chunks import TITAN, ChunkedReader, accelerates, are_of_model, open_dcp
from formats.iterations import (
    COMMON,
    FORMAT,
    NEMO_SETTINGS,
    TORCH,
    TRACKER,
    TRAIN_STATE,
    ZARR,
    backend,
    find_iteration,
    nemo_weights,
    unfinished,
)
from formats.megatron_reader import MegatronReader
from formats.rank_files import RankFilesReader
from formats.safetensors_slices import SlicedSafetensors, are_safetensors, has_slices, sliced_files
from formats.shard_files import INDEX, SINGLE, model_files
from formats.torch_dist import TorchDistReader
from formats.zarr import ARRAY, ZarrContainer

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = re.compile(r"adapter[\w-]*\.(safetensors|bin|pt|pth)")
_RUN_CONFIG = "run_config.yaml"

_ITERATION = re.compile(r"(iter_\d+|release)/")
_MEGATRON_NAME = re.compile(r"(.*\.)?(decoder|encoder)\.layers\..*|(decoder|encoder|embedding|output_layer)\..*")
_LATEST = "latest"
"""DeepSpeed's tracker."""

_MOST_FOLDERS = 200
"""Further sub-folders are not searched: a folder with so many is no collection of models."""


class Format(StrEnum):
    """The formats that can be read. The values are their names in reports."""

    HUGGINGFACE = "Hugging Face safetensors"
    SLICES = "Hugging Face safetensors in slices"
    DCP = "Hugging Face DCP"
    TITAN = "torchtitan DCP"
    PEFT = "PEFT adapter"
    TORCH_DIST = "Megatron torch_dist"
    ZARR = "Megatron zarr"
    FSDP_DTENSOR = "Megatron fsdp_dtensor"
    TORCH_DCP = "Megatron torch_dcp"
    RANK_FILES = "Megatron mp_rank files"
    NEMO = "NeMo"

    @property
    def is_megatron(self) -> bool:
        return self in MEGATRON


HUGGINGFACE = frozenset({Format.HUGGINGFACE, Format.SLICES, Format.DCP, Format.TITAN})
"""Models by the names of their own modules."""

MEGATRON = frozenset(Format) - HUGGINGFACE - {Format.PEFT}


_BY_BACKEND = {ZARR: Format.ZARR, TORCH: Format.RANK_FILES}
_UNDER = {
    "model.module.decoder.": Format.FSDP_DTENSOR, "model.module.embedding.": Format.FSDP_DTENSOR,
    "model.decoder.": Format.TORCH_DCP, "model.embedding.": Format.TORCH_DCP,
}  # fmt: skip
"""The formats without `metadata.json`, by what names of weights begin with."""

_EMBEDDING = "decoder.embed_tokens.weight"
"""A name of transformers' own in models whose layers are named as Megatron's are."""


def detect(folder: Folder) -> Format:
    """Return the format of a folder.

    Raises UserError for every other folder: it says what the folder is, as far as that is recognized, and what to do.
    """
    if folder.has(TRACKER):
        return _tracked(folder)
    if folder.has(METADATA):
        return _container(folder)
    if kind := _BY_BACKEND.get(backend(folder)):
        return Format.NEMO if kind is Format.RANK_FILES and folder.has(NEMO_SETTINGS[1]) else kind
    if folder.has(INDEX):
        return Format.HUGGINGFACE
    names = folder.children()
    if kind := _by_files(names) or (Format.NEMO if nemo_weights(names) else None):
        return kind
    if inner := accelerates(folder):
        return _container(inner)
    raise _unknown(folder, names)


def open_checkpoint(folder: Folder, *, any_dtype: bool = False) -> HuggingFaceReader | MegatronReader:
    """Open a model of either format; the caller closes the reader.

    `any_dtype`: accept safetensors dtypes that are compared and reported, and not converted. Raises UserError for every other
    format.
    """
    if detect(folder).is_megatron:
        return open_megatron(folder)
    return open_huggingface(folder, any_dtype=any_dtype)


def open_huggingface(folder: Folder, *, any_dtype: bool = False) -> HuggingFaceReader:
    """Open a model under the names of its own modules, whatever its files; the caller closes the reader.

    `any_dtype`: see `open_checkpoint`.
    """
    kind = detect(folder)
    if kind is Format.SLICES:
        names = folder.children()
        return ChunkedReader(folder, SlicedSafetensors(folder, sliced_files(folder, names) or _containers(names)))
    if kind in {Format.DCP, Format.TITAN}:
        return open_dcp(folder)
    return HuggingFaceReader(folder, any_dtype=any_dtype)


def open_megatron(folder: Folder) -> MegatronReader:
    """Open the latest iteration of a Megatron checkpoint's root, or the iteration that `folder` is; the caller closes the reader.

    Raises UserError for what is missing, incomplete or in another format.
    """
    iteration = find_iteration(folder)
    reader = _open_iteration(iteration, backend(iteration))
    reader.settings = next((FileRef(folder, name) for name in NEMO_SETTINGS if folder.has(name)), None)
    return reader


def _open_iteration(iteration: Folder, kind: str) -> MegatronReader:
    if kind == TORCH:
        return RankFilesReader(iteration)
    return TorchDistReader(iteration, container=ZarrContainer(iteration) if kind == ZARR else None)


def _tracked(root: Folder) -> Format:
    """Return the format of a root's latest iteration; that of most, where it is not to be found, which its reader says."""
    try:
        iteration = find_iteration(root)
        return _BY_BACKEND.get(backend(iteration)) or _container(iteration)
    except UserError:
        return Format.TORCH_DIST


def _container(folder: Folder) -> Format:
    """Return the format of a folder with `.metadata`, by the files that only Megatron writes or by the names of the tensors."""
    if folder.has(FORMAT) or folder.has(COMMON):
        return Format.TORCH_DIST
    names = folder.children()
    containers = _containers(names)
    if not containers and (kind := _by_files(names)):
        return kind
    if are_safetensors(folder, containers):
        return Format.SLICES
    tensors = sorted(read_index(folder).tensors)
    if kind := _by_tensors(tensors):
        return kind
    if not tensors or folder.has(TRAIN_STATE) or folder.has(_RUN_CONFIG):
        return Format.TORCH_DIST
    raise UserError(
        f"`{folder.label}` is a distributed checkpoint of PyTorch's, but not Megatron's: it holds {len(tensors)} tensors such as "
        f"`{tensors[0]}`, and no layers of a model",
        hint="load it with `torch.distributed.checkpoint` in the program that saved it, and save the model with "
        "`save_pretrained`",
    )


def _by_files(names: Sequence[str]) -> Format | None:
    """Return the format of a folder without `.metadata`, by the names of its files."""
    if has_slices(names) and SINGLE not in names:
        return Format.SLICES
    if model_files(names):
        return Format.HUGGINGFACE
    is_adapter = ADAPTER_CONFIG in names or any(ADAPTER_WEIGHTS.fullmatch(name) for name in names)
    return Format.PEFT if is_adapter else None


def _by_tensors(names: Sequence[str]) -> Format | None:
    """Return the format of a distributed checkpoint that says nothing else, by the names of its tensors."""
    for root, kind in _UNDER.items():
        if any(name.startswith(root) for name in names):
            return Format.DCP if any(name.endswith(_EMBEDDING) for name in names) else kind
    if any(_MEGATRON_NAME.fullmatch(name) for name in names):
        return Format.TORCH_DIST
    if any(TITAN.fullmatch(name) for name in names):
        return Format.TITAN
    return Format.DCP if are_of_model(names) else None


def _containers(names: Iterable[str]) -> list[str]:
    return [name for name in names if name.endswith(".distcp")]


def _unknown(folder: Folder, names: Sequence[str]) -> UserError:
    """Return the error for a folder in no supported format."""
    if not names:
        exists = not isinstance(folder, LocalFolder) or folder.path.is_dir()
        return UserError(
            f"`{folder.label}` is {'empty' if exists else 'not there'}", hint="give the folder that holds the weights"
        )
    if any(folder.below(name).has(ARRAY) for name in [name for name in names if name.endswith("/")][:_MOST_FOLDERS]):
        return unfinished(folder, FORMAT)
    _refuse_unfinished(folder, names)
    _refuse_root(folder, names)
    if _containers(names) or folder.name.startswith("iter_"):
        return unfinished(folder)
    foreign.refuse(folder.label, [*_of_latest_step(folder, names), *names])
    _refuse_parent(folder, names)
    listed = ", ".join(f"`{name}`" for name in names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
    return UserError(
        f"`{folder.label}` holds no weights: it is neither a Hugging Face directory nor a Megatron checkpoint",
        hint=f"the first has `*.safetensors` files, the second `{TRACKER}` or `{METADATA}`; there are: {listed}"
        f"{_not_fetched(folder)}",
    )


def _of_latest_step(folder: Folder, names: Sequence[str]) -> list[str]:
    """Return the names in DeepSpeed's latest step, which tell its stage. The root holds `latest`, which names that folder."""
    step = f"{folder.get(_LATEST).decode(errors='replace').strip()}/" if _LATEST in names else ""
    return [f"{step}{name}" for name in folder.below(step.rstrip("/")).children()] if step in names else []


def _not_fetched(folder: Folder) -> str:
    """Return a note on files that a snapshot of the Hub may lack because they were not fetched."""
    snapshot = isinstance(folder, LocalFolder) and "revision" in folder.origin
    return "; weights in other formats (`*.bin`, `*.pth`, `*.gguf`) may not have been fetched" if snapshot else ""


def _refuse_unfinished(folder: Folder, names: Sequence[str]) -> None:
    """Raise UserError for an unfinished download, unless there is a complete file of another format."""
    unfinished_files = foreign.unfinished_downloads(folder, names)
    if unfinished_files and not foreign.find(name for name in names if name not in unfinished_files):
        raise UserError(
            f"`{folder.label}` is an unfinished download: it has `{unfinished_files[0]}` and no weights",
            hint="restart the download, which continues where it stopped, and wait until it is complete",
        )


def _refuse_root(folder: Folder, names: Sequence[str]) -> None:
    """Raise UserError for a folder of iterations that has no tracker."""
    iterations = [name.rstrip("/") for name in names if _ITERATION.fullmatch(name)]
    if not iterations:
        return
    complete = [name for name in iterations if backend(folder.below(name))]
    given = ", ".join(f"`{folder.label}/{name}`" for name in reversed(complete[-5:]))
    raise UserError(
        f"`{folder.label}` has no `{TRACKER}`, which names its latest iteration; it has {_listed(iterations)}",
        hint=f"give one of them: {given}" if given else f"all of them are incomplete: they have no `{METADATA}`",
    )


def _refuse_parent(folder: Folder, names: Sequence[str]) -> None:
    """Raise UserError that names the sub-folders with weights, if there are any."""
    folders = [name.rstrip("/") for name in names if name.endswith("/")][:_MOST_FOLDERS]
    if "snapshots/" in names and "blobs/" in names:
        folders = [f"snapshots/{name.rstrip('/')}" for name in folder.below("snapshots").children()]
    holding = [name for name in folders if _holds_weights(folder.below(name))]
    if holding:
        raise UserError(
            f"`{folder.label}` has no weights itself; its sub-folders do: {_listed(holding)}",
            hint=f"give one of them: `{folder.label}/{holding[0]}`",
        )


def _holds_weights(folder: Folder) -> bool:
    names = folder.children()
    known = {INDEX, TRACKER, METADATA, ADAPTER_CONFIG}
    return bool(known.intersection(names) or model_files(names) or foreign.find(names))


def _listed(names: Sequence[str]) -> str:
    return ", ".join(f"`{name}`" for name in names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def refuse_file(path: str) -> None:
    """Raise UserError for a file where a folder should be given."""
    folder, _, name = path.rpartition(os.sep)
    folder = folder or ("" if path.startswith(os.sep) else ".")
    known = foreign.find([name])
    if known:
        raise UserError(f"`{path}` is a file: {known[0].what}", hint=foreign.hint(known[0], folder, name))
    raise UserError(f"`{path}` is a file", hint=f"give the directory that it is in: `{folder or os.sep}`")
