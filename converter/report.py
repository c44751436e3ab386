"""Describe a checkpoint from its headers. No tensor data is read."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from contextlib import closing
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any, cast

from converter import families, reference
from converter.adapter_files import DESCRIPTION
from converter.config import make_model
from converter.consistency import embedding_rows
from converter.hybrid import GPT, PATTERN, layout_of
from converter.nemo_config import settings_of
from converter.planner import stored_tensors
from converter.recognize import LAYER
from converter.side_files import CONFIG, config_of, load
from converter.sources import open_source
from converter.tables import Tables
from converter.training_state import TrainingState, training_state
from converter.writers import versions_of, writer_of
from formats.detect import Format, detect, open_huggingface, open_megatron
from formats.disk import user_errors
from formats.errors import UserError, format_untrusted, printable
from formats.folder import Folder
from formats.huggingface import HuggingFaceReader
from formats.huggingface_chunks import ChunkedReader
from formats.json_objects import read_json
from formats.megatron_reader import MegatronReader
from formats.pickles import others
from formats.spec import TensorSpec, extent, is_size

_MOST_PACKAGES = 16
_EXPERT = re.compile(r"\.experts\.\d+\.linear_fc2\.weight$")
"""A weight of an expert whose columns expert tensor parallelism divides."""


@dataclass(frozen=True, slots=True)
class DtypeRow:
    """One row of the dtype table. `bytes` are those on disk."""

    dtype: str
    tensors: int
    parameters: int
    bytes: int


@dataclass(frozen=True, slots=True)
class Report:
    """The contents of a directory."""

    path: str
    format: str
    writer: str
    family: str
    architecture: str
    parameters: int
    layers: int
    tensors: int
    dtypes: list[DtypeRow]
    files: int
    layout: dict[str, Any] = field(default_factory=dict[str, Any])
    """Of a Megatron checkpoint: its parallel sizes."""

    layers_as: str = ""
    """Of a Megatron checkpoint: `gpt` or `hybrid`, whose layers are attention or a feed-forward part."""

    iteration: str = ""
    optimizer_state: bool = False
    state: TrainingState | None = None
    """Of a Megatron checkpoint: what it holds beside its weights."""

    versions: str = ""
    """Of megatron-core, that write such a checkpoint; empty where the files do not tell."""

    unknown_packages: list[str] = field(default_factory=list[str])
    """Packages whose classes the common state names, besides Python's, torch's and megatron-core's: mostly a fork's."""

    tensor_list: list[dict[str, Any]] = field(default_factory=list[dict[str, Any]])


@user_errors()
def inspect_checkpoint(path: str | Path, *, tensors: bool = False) -> Report:
    """Describe a Hugging Face directory, the root of a Megatron checkpoint or one iteration, from its headers.

    `tensors` lists every weight. Raises UserError if it is damaged or none of these.

    >>> inspect_checkpoint("megatron").layout
    {'tp': 2, 'pp': 2, 'stages': 'Et*3|t*1L'}
    """
    with closing(open_source(path)) as folder:
        kind = detect(folder)
        return _megatron(folder, kind, tensors=tensors) if kind.is_megatron else _huggingface(folder, kind, tensors=tensors)


def _huggingface(folder: Folder, kind: Format, *, tensors: bool) -> Report:
    reader = open_huggingface(folder, any_dtype=True)
    config = config_of(reader) if reader.beside.has(CONFIG) else {}
    version = config.get("transformers_version")
    files = {name: file for file, shard in reader.shards.items() for name in shard.tensors}
    return Report(
        path=folder.label,
        format=kind.value,
        writer=f"transformers {format_untrusted(version)}" if version else "unknown",
        **_described(config, reader.specs),
        dtypes=_dtypes(reader.specs.values()),
        files=len(reader.files),
        optimizer_state=bool(reader.others),
        tensor_list=[{**_row(spec), **_where(reader, files, spec.name)} for spec in reader.specs.values()] if tensors else [],
    )


def _megatron(folder: Folder, kind: Format, *, tensors: bool) -> Report:
    reader = open_megatron(folder)
    recorded = settings_of(reader)
    fields, state = recorded[0].known if recorded else {}, training_state(reader)
    return Report(
        path=folder.label,
        format=f"{kind.value}, {_inner_kind(reader).value}" if kind is Format.NEMO else kind.value,
        writer=writer_of(reader),
        **_described(_config(reader), reader.specs),
        dtypes=_dtypes(reader.specs.values()),
        files=len(reader.files),
        layout=_layout(reader, {**reader.args(), **fields}),
        layers_as=_layers_as(reader),
        iteration=reader.folder.name,
        optimizer_state=reader.has_optimizer,
        state=state,
        versions=versions_of(reader, kind, state.optimizer),
        unknown_packages=_unknown_packages(reader),
        tensor_list=[{**_row(spec), "chunks": _chunks(reader, spec.name)} for spec in reader.specs.values()] if tensors else [],
    )


def _config(reader: MegatronReader) -> Mapping[str, Any]:
    """Return the checkpoint's `config.json`, or one of its settings in whose family every tensor has a name; else empty."""
    if own := load(reader.folder):
        return own.config
    try:
        config = reference.find(reader, None, vocab=embedding_rows(reader.specs)).config
        family = families.find(config["model_type"], layout_of(reader.specs))
        model = make_model(family.CONFIG, config)
        stored_tensors(Tables(family.RULES, model), model, reader.specs)
    except UserError:
        return {}
    return config


def _inner_kind(reader: MegatronReader) -> Format:
    """Return the format of the weights in a checkpoint of NeMo: files of ranks have no folder of their own there."""
    inner = detect(reader.folder)
    return Format.RANK_FILES if inner is Format.NEMO else inner


def _layers_as(reader: MegatronReader) -> str:
    """Return the layout of a model by its tensors, of an adapter by what it says."""
    if reader.folder.has(DESCRIPTION):
        return format_untrusted(read_json(reader.folder, DESCRIPTION).get("layout", GPT))
    return layout_of(reader.specs)


def _unknown_packages(reader: MegatronReader) -> list[str]:
    names = {printable(record.module.partition(".")[0]) for record in others(reader.common_state())}
    return sorted(format_untrusted(name) for name in names)[:_MOST_PACKAGES]


def _described(config: Mapping[str, Any], specs: Mapping[str, TensorSpec]) -> dict[str, Any]:
    family = format_untrusted(config.get("model_type") or "unknown")
    supported = family in families.names() or family == "unknown"
    return {
        "family": family if supported else f"{family} (not supported)",
        "architecture": _architecture(config.get("architectures")),
        "parameters": sum(prod(spec.stored_shape) for spec in specs.values()),
        "layers": len({match[0] for name in specs if (match := LAYER.search(name))}),
        "tensors": len(specs),
    }


def _architecture(names: Any) -> str:
    known = cast("list[Any]", names) if isinstance(names, list) else []
    return ", ".join(format_untrusted(name) for name in known) or "unknown"


def _dtypes(specs: Iterable[TensorSpec]) -> list[DtypeRow]:
    grouped: dict[str, list[TensorSpec]] = {}
    for spec in specs:
        grouped.setdefault(spec.stored_dtype, []).append(spec)
    return [
        DtypeRow(name, len(group), sum(prod(spec.stored_shape) for spec in group), sum(spec.nbytes for spec in group))
        for name, group in sorted(grouped.items())
    ]


def _layout(reader: MegatronReader, fields: Mapping[str, Any]) -> dict[str, Any]:
    """Return tensor parallelism by the chunks, and the other sizes by the recorded settings, if there are any."""
    whole = next((name for name in reader.specs if name.endswith("linear_proj.weight")), None)
    expert = next((name for name in reader.specs if _EXPERT.search(name)), None)
    recorded = {
        "pp": fields.get("pipeline_model_parallel_size"),
        "vpp": fields.get("virtual_pipeline_model_parallel_size"),
        "stages": fields.get("pipeline_model_parallel_layout"),
        "pattern": fields.get(PATTERN),
        "ep": fields.get("expert_model_parallel_size") if expert else None,
    }
    return {
        "tp": _column_blocks(reader, whole) if whole else 1,
        **{
            name: size if isinstance(size, str) or is_size(size) else format_untrusted(size)
            for name, size in recorded.items()
            if size
        },
        **({"etp": _column_blocks(reader, expert)} if expert else {}),
    }


def _column_blocks(reader: MegatronReader, name: str) -> int:
    """Return into how many blocks of columns a weight is divided."""
    return len({chunk.region[-1:] and chunk.region[-1].start for chunk in reader.chunks(name)})


def _row(spec: TensorSpec) -> dict[str, Any]:
    return {"name": spec.name, "shape": list(spec.stored_shape), "dtype": spec.stored_dtype}


def _where(reader: HuggingFaceReader, files: Mapping[str, str], name: str) -> dict[str, Any]:
    return {"chunks": _chunks(reader, name)} if isinstance(reader, ChunkedReader) else {"file": files[name]}


def _chunks(reader: MegatronReader | ChunkedReader, name: str) -> list[dict[str, Any]]:
    return [
        {"file": chunk.location.file, "at": [part.start for part in chunk.region], "shape": list(extent(chunk.region))}
        for chunk in reader.chunks(name)
    ]
