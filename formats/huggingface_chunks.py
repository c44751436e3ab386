"""Read models whose tensors are stored in chunks under the names of Hugging Face or torchtitan: the rows of each process.

FSDP2, accelerate, TRL and torchtitan write PyTorch's distributed checkpoint (`.metadata` and `.distcp` files). The names are
those of the model, bare or under `model.`, with the optimizer's state beside them. PyTorch's `HuggingFaceStorageWriter` writes
safetensors files of slices. Translating torchtitan's names is left to the converter.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Sequence

from formats.chunks import Chunk, ChunkedTensor
from formats.container import TensorContainer
from formats.dcp import DcpContainer
from formats.errors import UserError
from formats.folder import Folder, LocalFolder
from formats.huggingface import HuggingFaceReader
from formats.spec import Array, Region, TensorSpec

CONFIG = "config.json"
ROOT = "model."
"""What precedes the names where a program saved the model's state beside others."""

ACCELERATE = re.compile(r"pytorch_model_fsdp_\d+/")
"""The folder that accelerate puts the model's container in, beside its other files."""

TITAN = re.compile(r"(model\.)?layers\.\d+\.attention\.(qkv_linear\.)?wq\.weight")
_IN_LAYER = re.compile(r"(.*\.)?(layers|h|blocks)\.\d+\..+")
_ROOTED = re.compile(r"model\.(model|lm_head|embed_out|gpt_neox|transformer\.h|layers\.\d+\.attention\.(qkv_linear\.)?wq)\..+")
_STATE = re.compile(r"(optim\w*|state|param_groups|lr_scheduler|scheduler|train_state|dataloader|rng\w*|random_states)([.].*)?")


class ChunkedReader(HuggingFaceReader):
    """An opened model; see `HuggingFaceReader`. Its files are of no use to an export, so it has no map of shards."""

    def __init__(self, folder: Folder, container: TensorContainer, *, beside: Folder | None = None) -> None:
        """`beside`: the folder with `config.json` and side files, where it is not `folder`.

        Raises UserError for chunks that overlap, leave gaps or run past their files, and for a container without weights.
        """
        self.folder, self.beside = folder, beside or folder
        self.shards, self.indexed = {}, False
        self._container = container
        names = list(container.tensor_names)
        self.others = other_state(names)
        root, others = root_of(names), set(self.others)
        self._tensors: dict[str, ChunkedTensor] = {}
        for name in names:
            if name not in others:
                self._tensors[name.removeprefix(root)] = container.tensor(name)
        self.specs = {name: TensorSpec(name, tensor.shape, tensor.dtype) for name, tensor in self._tensors.items()}
        if not self.specs:
            raise UserError(
                f"`{folder.label}` holds no weights: its tensors are of an optimizer, such as `{names[0]}`"
                if names
                else f"`{folder.label}` holds no tensors",
                hint="give the folder of the model, which is beside it where accelerate wrote both",
            )

    @property
    def files(self) -> Collection[str]:
        return {*self._container.files, *self._container.index_files}

    def read(self, name: str, region: Region, out: Array) -> None:
        self._container.read(self._tensors[name], region, out)

    def chunks(self, name: str) -> Sequence[Chunk]:
        """Return the chunks that hold a tensor."""
        return self._tensors[name].chunks

    def close(self) -> None:
        self._container.close()


def open_dcp(folder: Folder) -> ChunkedReader:
    """Open a distributed checkpoint of PyTorch's, or the folder that accelerate put one in; the caller closes the reader."""
    inner = accelerates(folder)
    if inner:
        return ChunkedReader(inner, DcpContainer(inner), beside=folder)
    return ChunkedReader(folder, DcpContainer(folder), beside=_described(folder))


def accelerates(folder: Folder) -> Folder | None:
    """Return the container of the model in a folder that accelerate wrote; None for other folders."""
    inner = [name.rstrip("/") for name in folder.children() if ACCELERATE.fullmatch(name)]
    return folder.below(inner[0]) if len(inner) == 1 and folder.below(inner[0]).has(".metadata") else None


def _described(folder: Folder) -> Folder:
    """Return the folder with `config.json`: `folder`, or the one that it is in."""
    if not folder.has(CONFIG) and isinstance(folder, LocalFolder):
        above = LocalFolder(folder.path.resolve().parent)
        if above.has(CONFIG) and ACCELERATE.fullmatch(f"{folder.name}/"):
            return above
    return folder


def are_of_model(names: Iterable[str]) -> bool:
    """Return whether these names have weights of a model with layers. Megatron's are recognized before.

    >>> are_of_model(["model.layers.0.mlp.up_proj.weight", "lm_head.weight"])
    True
    """
    return any(_IN_LAYER.fullmatch(name) and not _STATE.fullmatch(name) for name in names)


def root_of(names: Iterable[str]) -> str:
    """Return what precedes the names of a model's weights: `model.` where its state was saved as one of several, else nothing.

    >>> root_of(["model.model.layers.0.mlp.up_proj.weight", "optimizer.state.model.norm.weight.exp_avg"])
    'model.'
    """
    return ROOT if any(_ROOTED.fullmatch(name) for name in names) else ""


def other_state(names: Iterable[str]) -> list[str]:
    """Return the tensors that are not weights: all outside the root, or the optimizer's and the trainer's."""
    names = list(names)
    root = root_of(names)
    return [name for name in names if not name.startswith(root) or (not root and _STATE.fullmatch(name))]
