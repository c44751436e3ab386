"""Every reader, with real files to damage and an oracle for what it accepts.

What is checkable where damage is accepted: a safetensors file gives the bytes its own header points at, as the safetensors
library reads them; an index never changes a value; a damaged `.metadata` gives bytes of whole chunks that torch finds in the
undamaged data files, and the same values for a tensor whose description and places did not change; a damaged archive gives
bytes of the data record that Python's zipfile finds; a pickle gives what Python's C unpickler gives; JSON what `json` gives; a
configuration the sizes it says. Data bytes themselves carry no checksum: damage to them changes values, here as in torch.
"""

from __future__ import annotations

import io
import itertools
import json
import struct
from collections.abc import Iterator
from contextlib import redirect_stdout
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import safetensors

from converter import families, hf_to_mcore, inspect, mcore_to_hf, run_config
from converter.adapters import peft_config
from converter.adapters.merge import open_adapter
from converter.adapters.names import Factor
from converter.config import make_model
from converter.console import show_report
from converter.reference import rebuild_config
from formats import detect, pickles
from formats.disk import user_errors
from formats.folder import LocalFolder
from formats.huggingface import HuggingFaceReader
from formats.json_objects import parse_json, read_json
from formats.optimizer.open import open_optimizer
from formats.pickles import Record
from formats.spec import extent
from formats.torch_dist import TorchDistReader
from formats.torch_zip import OpenArchive
from tests.fuzz import bases, ranks
from tests.fuzz.bases import Files
from tests.fuzz.by_torch import bytes_by_torch
from tests.fuzz.chunked import CHUNKED
from tests.fuzz.stubs import plain, stubbed
from tests.fuzz.target import Target
from tests.fuzz.zips import zipped

for _name in ("raw_unicode_escape", "latin-1", "ascii", "utf-16-le", "utf-16-be"):
    "".encode(_name)


def open_huggingface(folder: Path) -> HuggingFaceReader:
    return HuggingFaceReader(LocalFolder(folder))


def open_megatron(folder: Path) -> TorchDistReader:
    return TorchDistReader(LocalFolder(folder))


@user_errors()
def huggingface_contents(folder: Path) -> dict[str, np.ndarray]:
    """Every tensor's values."""
    reader = open_huggingface(folder)
    try:
        tensors = {name: np.empty(spec.shape, spec.dtype) for name, spec in reader.specs.items()}
        for name, out in tensors.items():
            reader.read(name, reader.specs[name].full_region, out)
    finally:
        reader.close()
    return tensors


def check_safetensors(tensors: dict[str, np.ndarray], folder: Path, _before: Files) -> None:
    raw = (folder / "model.safetensors").read_bytes()
    start = 8 + struct.unpack("<Q", raw[:8])[0]
    header = json.loads(raw[8:start])
    header.pop("__metadata__", None)
    assert tensors.keys() == header.keys()
    for name, entry in header.items():
        first, last = entry["data_offsets"]
        assert tensors[name].tobytes() == raw[start + first : start + last]
        assert list(tensors[name].shape) == entry["shape"]
    library = dict(safetensors.deserialize(raw))  # what is read here, the library reads
    assert {name: bytes(entry["data"]) for name, entry in library.items()} == {
        name: array.tobytes() for name, array in tensors.items()
    }


def check_same_weights(tensors: dict[str, np.ndarray], _folder: Path, _before: Files) -> None:
    expected = bases.weights()
    assert tensors
    assert all(array.tobytes() == expected[name].tobytes() for name, array in tensors.items())


@user_errors()
def plan_import(folder: Path) -> Any:
    return read_json(LocalFolder(folder), "config.json"), hf_to_mcore(
        folder, folder.parent / "out", dry_run=True, make_vocab_size_divisible_by=4
    )


def check_sizes(planned: tuple[dict[str, Any], Any], folder: Path, _before: Files) -> None:
    config = json.loads((folder / "config.json").read_bytes())
    model = make_model(families.find(planned[0]["model_type"]).CONFIG, planned[0])
    sizes = {
        "hidden_size": model.hidden,
        "num_hidden_layers": model.layers,
        "vocab_size": model.vocab,
        "head_dim": model.head_dim,
    }
    for name, size in sizes.items():
        assert config.get(name) in (size, None)
    assert planned[1].parameters >= sum(a.size for a in bases.weights().values()) - 2 - 64  # extras and a tied output layer


@dataclass
class Chunks:
    """What a Megatron iteration gave: each chunk's place and bytes by tensor and corner, and each weight's chunks, shape and
    dtype, and bytes."""

    chunks: dict[tuple[str, tuple[int, ...]], tuple[Any, bytes]]
    weights: dict[str, tuple[Any, Any, bytes]]


@user_errors()
def megatron_contents(folder: Path) -> Chunks:
    """Every chunk of every tensor, and every weight; the common state too."""
    reader = open_megatron(folder)
    try:
        reader.check(reader.specs)
        reader.args()
        contents = Chunks({}, {})
        for name in reader.container.tensor_names:
            tensor = reader.container.tensor(name)
            for chunk in tensor.chunks:
                corner = tuple(part.start for part in chunk.region)
                contents.chunks[name, corner] = chunk.location, _region(tensor, chunk, reader.container)
        for name, spec in reader.specs.items():
            out = np.empty(spec.shape, spec.dtype)
            reader.read(name, spec.full_region, out)
            contents.weights[name] = reader.chunks(name), (spec.shape, spec.dtype), out.tobytes()
    finally:
        reader.close()
    return contents


def _region(tensor: Any, chunk: Any, container: Any) -> bytes:
    """A chunk's bytes; its first element is asked for before memory is taken for all of it."""
    if all(extent(chunk.region)):
        corner = tuple(slice(part.start, part.start + 1) for part in chunk.region)
        container.read(tensor, corner, np.empty(extent(corner), tensor.dtype))
    out = np.empty(extent(chunk.region), tensor.dtype)
    container.read(tensor, chunk.region, out)
    return out.tobytes()


def check_index(contents: Chunks, _folder: Path, before: Files) -> None:
    data, known = (
        bytes_by_torch(before[".metadata"], tuple(sorted(_files(before)))),
        _undamaged(tuple(sorted(_files(before, "")))),
    )
    assert all(raw in data for _, raw in contents.chunks.values() if raw), "bytes that are no chunk's"
    for name, (chunks, spec, raw) in contents.weights.items():
        if name in known.weights and known.weights[name][:2] == (chunks, spec):
            assert raw == known.weights[name][2], f"{name} changed"


def _files(before: Files, ending: str = ".distcp") -> Iterator[tuple[str, bytes]]:
    return ((name, data) for name, data in before.items() if name.endswith(ending))


@cache
def _undamaged(files: tuple[tuple[str, bytes], ...]) -> Chunks:
    from tempfile import TemporaryDirectory

    with TemporaryDirectory() as name:
        bases.write(Path(name), dict(files))
        return megatron_contents(Path(name))


def check_data(contents: Chunks, folder: Path, _before: Files) -> None:
    for location, raw in contents.chunks.values():
        whole = (folder / location.file).read_bytes()[location.offset : location.offset + location.length]
        records = zipped(whole)
        assert records is None or any(raw in record for record in records), f"not the record's bytes: {location}"


def read_archive(folder: Path) -> list[bytes]:
    data = (folder / "archive").read_bytes()

    def fetch(at: int, size: int) -> bytes:
        assert 0 <= at <= at + size <= len(data), "a read outside the archive"
        return data[at : at + size]

    archive = OpenArchive(fetch, len(data), source="archive")
    document = archive.pickle()
    todo, values = [document], []
    while todo and len(values) < 100:
        value = todo.pop()
        if isinstance(value, Record):
            values.append(archive.array(value).tobytes())
        elif isinstance(value, (list, dict)) and len(value) < 100:
            todo += value.values() if isinstance(value, dict) else value
    return values


def check_archive(arrays: list[bytes], folder: Path, _before: Files) -> None:
    records = zipped((folder / "archive").read_bytes())
    assert records is None or all(any(raw in record for record in records) for raw in arrays)


def read_pickle(folder: Path) -> Any:
    return pickles.loads((folder / "pickle").read_bytes(), source="pickle")


def check_pickle(value: Any, folder: Path, _before: Files) -> None:
    expected = stubbed((folder / "pickle").read_bytes())
    assert expected is None or plain(value) == plain(expected[0])


def read_document(folder: Path) -> dict[str, Any]:
    return parse_json((folder / "integrity.json").read_bytes(), source="integrity.json")


def check_document(document: dict[str, Any], folder: Path, _before: Files) -> None:
    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        assert len(dict(pairs)) == len(pairs)
        return dict(pairs)

    assert repr(document) == repr(json.loads((folder / "integrity.json").read_bytes(), object_pairs_hook=once))


@user_errors()
def describe_and_plan(folder: Path) -> Any:
    """What `inspect` and a dry run of the way back say of a checkpoint."""
    with redirect_stdout(io.TextIOWrapper(io.BytesIO(), "utf-8", errors="backslashreplace")):
        report = inspect(folder, tensors=True)
        show_report(report, as_json=False)
        show_report(report, as_json=True)
    return mcore_to_hf(folder, folder.parent / "out", dry_run=True)


def check_planned(summary: Any, _folder: Path, _before: Files) -> None:
    assert sum(a.size for a in bases.weights().values()) - 2 >= summary.parameters - 2 > 0
    assert not Path(summary.target).exists()


@user_errors()
def rebuild(folder: Path) -> Any:
    reader = open_megatron(folder)
    fields = run_config.read(LocalFolder(folder), reader.args())
    reader.close()
    return fields and (fields[0], rebuild_config(*fields), describe_and_plan(folder))


def check_rebuilt(rebuilt: Any, folder: Path, before: Files) -> None:
    if rebuilt:
        fields, config, summary = rebuilt
        assert config["hidden_size"] == fields["hidden_size"] == 8
        check_planned(summary, folder, before)


@user_errors()
def adapter_contents(folder: Path) -> dict[str, np.ndarray]:
    """Every factor of an adapter by its name in PEFT's files, read as one that is merged."""
    adapter = open_adapter(LocalFolder(folder))
    try:
        factors: dict[str, np.ndarray] = {}
        for weight, parts in adapter.parts.items():
            delta = adapter.read_delta(weight)
            assert np.isfinite(delta.scale)
            factors |= {parts[Factor.A].spec.name: delta.a, parts[Factor.B].spec.name: delta.b}
    finally:
        adapter.close()
    return factors


def check_adapter_config(factors: dict[str, np.ndarray], folder: Path, _before: Files) -> None:
    """A configuration chooses and scales; it changes no factor, and what it says is what PEFT's own rule says."""
    _same_factors(factors, bases.factors())
    config = peft_config.read(LocalFolder(folder))
    for name in factors:
        module = name.removeprefix("base_model.model.").rpartition(".lora_")[0]
        assert config.targets(module)
        assert config.rank(module) == factors[name].shape[0 if ".lora_A." in name else 1]


def check_adapter_file(factors: dict[str, np.ndarray], folder: Path, _before: Files) -> None:
    library = dict(safetensors.deserialize((folder / "adapter_model.safetensors").read_bytes()))
    assert {name: bytes(entry["data"]) for name, entry in library.items()} == {
        name: array.tobytes() for name, array in factors.items()
    }


def check_same_factors(factors: dict[str, np.ndarray], _folder: Path, _before: Files) -> None:
    _same_factors(factors, bases.factors())


def _same_factors(factors: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    assert factors
    assert all(array.tobytes() == expected[name].tobytes() for name, array in factors.items())


@user_errors()
def zarr_contents(folder: Path) -> dict[str, np.ndarray]:
    """Every weight's values."""
    reader = detect.open_megatron(LocalFolder(folder))
    try:
        reader.check()
        values = {name: np.empty(spec.shape, spec.dtype) for name, spec in reader.specs.items()}
        for name, out in values.items():
            reader.read(name, reader.specs[name].full_region, out)
    finally:
        reader.close()
    return values


def check_zarr(values: dict[str, np.ndarray], folder: Path, before: Files) -> None:
    described = json.loads((folder / bases.ZARRAY).read_bytes())
    shape, chunks = described["shape"], described["chunks"]
    dtype = np.dtype(ml_dtypes.bfloat16 if described["dtype"] == "bfloat16" else described["dtype"])
    whole = np.empty([-(-size // step) * step for size, step in zip(shape, chunks, strict=True)], dtype)
    corners = [range(0, size, step) for size, step in zip(whole.shape, chunks, strict=True)]
    for corner in itertools.product(*corners) if whole.size else ():
        name = ".".join(str(start // step) for start, step in zip(corner, chunks, strict=True)) or "0"
        data = before[f"{bases.ZARRAY.removesuffix('.zarray')}{name}"]
        region = tuple(slice(start, start + step) for start, step in zip(corner, chunks, strict=True))
        whole[region] = np.frombuffer(data, dtype).reshape(chunks)
    expected = whole[tuple(slice(0, size) for size in shape)]
    assert len(expected) == sum("linear_fc2" in name for name in values)
    for layer, weight in enumerate(expected):
        assert values[f"decoder.layers.{layer}.mlp.linear_fc2.weight"].tobytes() == weight.tobytes()


@user_errors()
def optimizer_contents(folder: Path) -> tuple[Any, list[Any]]:
    """The shapes of the weights, and of every state that is read, all of it."""
    reader = open_megatron(folder)
    try:
        optimizer = open_optimizer(reader)
        states = list(optimizer.states.values()) if optimizer else []
        for state in states:
            for name, spec in state.specs.items():
                state.read(name, spec.full_region, np.empty(spec.shape, spec.dtype))
        return {name: spec.shape for name, spec in reader.specs.items()}, [state.specs for state in states]
    finally:
        reader.close()


def check_optimizer(contents: tuple[Any, list[Any]], _folder: Path, _before: Files) -> None:
    weights, states = contents
    for specs in states:
        assert specs.items()
        assert all(spec.shape == weights[name] for name, spec in specs.items())


_HEADER = "huggingface/headers/model-00001-of-00002.safetensors"
_EXTRAS = "huggingface/extras.safetensors"

TARGETS = (
    Target("safetensors", "header", "model.safetensors", bases.one_file, huggingface_contents, check_safetensors, share=3),
    Target("index", "json", "model.safetensors.index.json", bases.indexed, huggingface_contents, check_same_weights, share=3),
    Target("config", "json", "config.json", bases.huggingface, plan_import, check_sizes, share=3),
    Target("archive", "archive", "archive", bases.archives, read_archive, check_archive, share=3),
    Target("pickle", "pickle", "pickle", bases.pickled, read_pickle, check_pickle, share=3),
    Target("metadata", "pickle", ".metadata", bases.by_torch, megatron_contents, check_index),
    Target("distcp", "archives", "__0_0.distcp", bases.by_torch, megatron_contents, check_data),
    Target("common", "archive", "common.pt", bases.with_args, rebuild, check_rebuilt),
    Target("run_config", "yaml", "run_config.yaml", bases.bare, rebuild, check_rebuilt),
    Target("optimizer", "pickle", ".metadata", bases.optimizers, optimizer_contents, check_optimizer),
    Target("zarr", "json", bases.ZARRAY, bases.zarr, zarr_contents, check_zarr),
    Target("ranks", "archive", ranks.FILE, ranks.plain, ranks.read, ranks.check),
    Target("ranks_distributed", "archive", ranks.FILE, ranks.distributed, ranks.read, ranks.check),
    Target("ranks_optimizer", "archive", ranks.OPTIMIZER, ranks.distributed, ranks.read, ranks.check),
    Target("carried_config", "json", "huggingface/files/config.json", bases.carried, describe_and_plan, check_planned),
    Target("carried_header", "header", _HEADER, bases.carried, describe_and_plan, check_planned),
    Target("carried_extras", "header", _EXTRAS, bases.carried, describe_and_plan, check_planned),
    Target("tracker", "bytes", "latest_checkpointed_iteration.txt", bases.megatron, describe_and_plan, check_planned),
    Target("format", "json", "metadata.json", bases.carried, describe_and_plan, check_planned),
    Target("adapter_config", "json", "adapter_config.json", bases.adapters, adapter_contents, check_adapter_config, share=3),
    Target("adapter_file", "header", "adapter_model.safetensors", bases.adapters, adapter_contents, check_adapter_file),
    Target("adapter", "json", "adapter.json", bases.megatron_adapters, adapter_contents, check_same_factors),
    *CHUNKED,
    Target("json", "json", "integrity.json", bases.checksums, read_document, check_document, share=3),
)
"""Every reader there is, by what it reads."""
