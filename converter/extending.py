"""Plan a model with another number of tokens: other rows in its embedding and its output layer, and settings that say so."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from converter import families, reference, run_config
from converter.config import make_model
from converter.conversion import Conversion
from converter.dequantization import weights_of
from converter.derived import DerivedCheckpoint, of_command
from converter.execution import Reporter
from converter.exporting import ExportOptions, plan_files
from converter.families import Family
from converter.hybrid import layout_of
from converter.importing import left_out
from converter.model import Model
from converter.padded_vocab import tokenizer_size
from converter.plan import as_stored, list_names
from converter.planner import to_megatron as plan_megatron
from converter.recognize import refuse_unfit
from converter.resharding import ReshardOptions, plan_reshard
from converter.resized import MEMORY, GivenRows, MeanRow, NewRows, ResizedReader, RoundedRows, ZeroRows
from converter.run import PIECE_BYTES
from converter.run_state import TrainingRun, open_run
from converter.side_files import CONFIG, EXTRAS, FILES, HEADERS, HFReference
from converter.sources import huggingface_source
from converter.values import KEEP
from converter.vocabulary import huggingface_names, megatron_names, refuse_lost_tokens, refuse_unknown, resized_config
from formats.dtypes import FLOATS
from formats.errors import UserError
from formats.folder import FileRef, Folder
from formats.huggingface import HuggingFaceReader, Shard, make_index, retyped, specs_of
from formats.json_objects import read_json
from formats.megatron_reader import MegatronReader
from formats.optimizer.state import MASTER
from formats.overlaid_folder import OverlaidFolder
from formats.quantized.reader import DequantizedReader
from formats.shard_files import INDEX
from formats.spec import DTYPES, Reader, TensorSpec

ZERO, MEAN = "zero", "mean"
_GENERATION = "generation_config.json"
_FLOAT_DTYPES = frozenset(DTYPES[name] for name in FLOATS)


@dataclass(frozen=True, slots=True, kw_only=True)
class ExtendOptions:
    """The options that the bytes of another vocabulary depend on."""

    size: int
    init: str | FileRef
    """`zero`, `mean`, or a safetensors file with the new rows."""

    hf_config: Folder | None
    weights_only: bool
    integrity: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class _Resize:
    """A model that was recognized, and what becomes of its vocabulary."""

    model: Model
    """As it was."""

    size: int
    """The number of tokens that it gets."""

    config: dict[str, Any]
    """The `config.json` of the output."""

    tensors: ResizedReader
    new_rows: NewRows
    names: Mapping[str, str]
    """The reader's tensors with a row for each token, each with its Hugging Face name."""

    @property
    def dtypes(self) -> dict[str, np.dtype[Any]]:
        """Those of these tensors, by their Hugging Face names."""
        return {other: self.tensors.specs[name].dtype for name, other in self.names.items()}


def extend_model(reader: HuggingFaceReader, wanted: ExtendOptions, reporter: Reporter, *, workers: int) -> Conversion:
    """Return the conversion of a Hugging Face directory to one with another number of tokens."""
    source = huggingface_source(reader, wanted.hf_config)
    origin, tensors = source.reference, source.reader
    if isinstance(tensors, DequantizedReader):
        raise _quantized(reader.folder)
    family = families.find(origin.config.get("model_type")).rooted(tensors.specs)
    model = make_model(family.CONFIG, origin.config)
    refuse_unfit(tensors.specs, origin.config, family, model, label=reader.folder.label)
    passing = family.PASSTHROUGH_PREFIXES
    plan = plan_megatron(family.RULES, family.EXTRAS, model, tensors.specs, dtype=KEEP, passing=passing)
    refuse_unknown((tensors.specs[name] for name in plan.extras), model)
    resize = _resize(tensors, huggingface_names(family, model, tensors.specs), family, origin, wanted)
    shards = _resized(origin.shards, resize.tensors.specs)
    folder = OverlaidFolder(reader.beside, {CONFIG: _json(resize.config), INDEX: make_index(shards)})
    files = {name: FileRef(folder, name) if file.folder is reader.beside else file for name, file in origin.files.items()}
    source = replace(source, reader=resize.tensors, reference=replace(origin, config=resize.config, shards=shards, files=files))
    for text in (*left_out(source), *_notes(resize, wanted, reader.beside)):
        reporter.note(text)
    options = ExportOptions(hf_config=None, max_shard_size=None, dtype=KEEP, integrity=wanted.integrity)
    conversion = plan_files(source, list(as_stored(resize.tensors.specs).values()), options, reporter)
    return _extended(conversion, resize, wanted, workers=workers)


def extend_megatron(
    reader: MegatronReader, root: Folder, wanted: ExtendOptions, reporter: Reporter, *, workers: int
) -> Conversion:
    """Return the conversion of a Megatron checkpoint to one with another number of tokens, in the same layout. `root` is the
    folder that the user named."""
    if reader.settings:
        raise UserError(
            f"`{reader.folder.label}` is NeMo's, whose `{reader.settings.name}` counts tokens in its own way",
            hint="make it a checkpoint of Megatron's first: `mbconvert reshard`",
        )
    origin = reference.find(reader, wanted.hf_config, any_settings=True)
    stored = specs_of(origin.shards)
    if weights_of(stored, origin.config):
        raise _quantized(reader.folder)
    family = families.find(origin.config.get("model_type"), layout_of(reader.specs)).rooted(stored)
    model = make_model(family.CONFIG, origin.config)
    if reader.folder.has(EXTRAS):
        refuse_unknown(HuggingFaceReader(reader.folder, files=[EXTRAS], any_dtype=True).specs.values(), model)
    resize = _resize(reader, megatron_names(family, model, reader.specs), family, origin, wanted)
    folder = OverlaidFolder(reader.folder, _documents(reader.folder, origin, resize, huggingface_names(family, model, stored)))
    counts = [name for name in ("vocab_size", "padded_vocab_size") if reader.args().get(name)]
    derived = DerivedCheckpoint(reader, resize.tensors, folder=folder, args=dict.fromkeys(counts, wanted.size))
    given = OverlaidFolder(wanted.hf_config, {CONFIG: _json(resize.config)}) if wanted.hf_config else None
    for text in _notes(resize, wanted, reader.folder.below(FILES)):
        reporter.note(text)
    options = ReshardOptions.of_same_layout(reader, hf_config=given, weights_only=wanted.weights_only, integrity=wanted.integrity)
    run = None if wanted.weights_only else _resized_run(open_run(reader), resize)
    return _extended(plan_reshard(derived, root, options, reporter, run=run, workers=workers), resize, wanted, workers=workers)


def _resized_run(run: TrainingRun | None, resize: _Resize) -> TrainingRun | None:
    """Return the training run with another number of tokens: new rows have no moments, and their weights as masters."""
    if not run:
        return None
    states = {
        state: ResizedReader(
            reader,
            {name: other for name, other in resize.names.items() if name in reader.specs},
            tokens=resize.model.vocab,
            size=resize.size,
            new_rows=RoundedRows(resize.new_rows, resize.dtypes) if state == MASTER else ZeroRows(),
        )
        for state, reader in run.optimizer.states.items()
    }
    return TrainingRun.of(run.checkpoint, run.optimizer._replace(states=states))


def _resize(
    reader: Reader,
    names: Mapping[str, str],
    family: Family,
    origin: HFReference,
    wanted: ExtendOptions,
) -> _Resize:
    model, size = make_model(family.CONFIG, origin.config), wanted.size
    if size == model.vocab:
        raise UserError(f"the model has {size} tokens already")
    if size < model.vocab:
        _check_shrink(origin, wanted)
    own = {other: name for name, other in reversed(list(names.items()))}
    rows = _new_rows(reader, own, model, wanted)
    tensors = ResizedReader(reader, names, tokens=model.vocab, size=size, new_rows=rows)
    config = resized_config(family, origin.config, size)
    return _Resize(model=model, size=size, config=config, tensors=tensors, new_rows=rows, names=names)


def _check_shrink(origin: HFReference, wanted: ExtendOptions) -> None:
    """Raise UserError for a model that needs tokens which would be left out, and for new rows where there are none."""
    if wanted.init != MEAN:
        raise UserError(f"`--to {wanted.size}` adds no token, so that `--init` has no effect", hint="leave one of both out")
    files = {CONFIG: origin.config}
    if generation := origin.files.get(_GENERATION):
        files[_GENERATION] = read_json(generation.folder, _GENERATION)
    refuse_lost_tokens(files, wanted.size)


def _new_rows(reader: Reader, own: Mapping[str, str], model: Model, wanted: ExtendOptions) -> NewRows:
    """Return where new rows come from. `own`: the reader's tensor of each Hugging Face name."""
    if wanted.init == ZERO:
        return ZeroRows()
    if isinstance(wanted.init, str):
        return MeanRow(reader, own, tokens=model.vocab)
    given = HuggingFaceReader(wanted.init.folder, files=[wanted.init.name])
    shapes = {name: (wanted.size - model.vocab, *reader.specs[stored].shape[1:]) for name, stored in own.items()}
    return GivenRows(given, _matched(given.specs, shapes, wanted.init.name))


def _matched(given: Mapping[str, TensorSpec], shapes: Mapping[str, tuple[int, ...]], file: str) -> dict[str, str]:
    """Return the tensor of a file for each that gets new rows: that of the same name, or the only one for all.

    Raises UserError unless all of them are there, no others, and in these shapes.
    """
    only = next(iter(given)) if len(given) == 1 else ""
    names = dict.fromkeys(shapes, only) if only and only not in shapes else {name: name for name in shapes}
    if missing := [name for name, tensor in names.items() if tensor not in given]:
        raise UserError(
            f"`{file}` lacks the new rows of {list_names(missing)}",
            hint=f"it holds one tensor of another name, whose rows all of them get, or each of {list_names(list(shapes))}",
        )
    if over := sorted(given.keys() - names.values()):
        raise UserError(f"`{file}` holds {list_names(over)}, which have no place in the vocabulary of this model")
    for name, tensor in names.items():
        spec = given[tensor]
        if spec.shape != shapes[name] or spec.dtype not in _FLOAT_DTYPES:
            raise UserError(
                f"`{tensor}` in `{file}` is {spec.stored_dtype} of shape {list(spec.shape)}; the new rows of `{name}` have shape "
                f"{list(shapes[name])}",
                hint=f"they are floating-point numbers, [new tokens, …]: dtypes {', '.join(FLOATS)}",
            )
    return names


def _resized(shards: Mapping[str, Shard], specs: Mapping[str, TensorSpec]) -> dict[str, Shard]:
    return {file: retyped(shard, specs) for file, shard in shards.items()}


def _documents(folder: Folder, origin: HFReference, resize: _Resize, names: Mapping[str, str]) -> dict[str, bytes]:
    """Return the documents of an iteration that say how many tokens there are, with the new size. `names`: the tensors with a
    row for each in the model's Hugging Face files."""
    size, made = resize.size, dict[str, bytes]()
    if folder.has(run_config.FILE):
        made[run_config.FILE] = run_config.with_tokens(folder.get(run_config.FILE), size)
    if not folder.below(FILES).has(CONFIG):
        return made
    stored = specs_of(origin.shards)
    specs = {**stored, **{name: replace(stored[name], shape=(size, *stored[name].shape[1:])) for name in names}}
    shards = _resized(origin.shards, specs)
    made[f"{FILES}/{CONFIG}"] = _json(resize.config)
    made |= {f"{HEADERS}/{file}": shard.raw for file, shard in shards.items()}
    if folder.below(FILES).has(INDEX):
        made[f"{FILES}/{INDEX}"] = make_index(shards)
    return made


def _json(config: Mapping[str, Any]) -> bytes:
    return (json.dumps(config, indent=2) + "\n").encode()


def _quantized(folder: Folder) -> UserError:
    return UserError(
        f"the weights of `{folder.label}` are quantized, and so may be those of its vocabulary",
        hint="make plain ones first: `mbconvert hf-to-mcore`, then `mbconvert mcore-to-hf --dtype bf16`",
    )


def _notes(resize: _Resize, wanted: ExtendOptions, beside: Folder) -> list[str]:
    """Return what a user should know. `beside` is the folder of the tokenizer's files."""
    before, after = resize.model.vocab, wanted.size
    notes = [f"`{CONFIG}` changed: `vocab_size` from `{before}` to `{after}`"]
    known = tokenizer_size(beside)
    if known and known > after:
        notes.append(f"the tokenizer's files are copied as they are: they have {known} tokens")
    return notes


def _extended(conversion: Conversion, resize: _Resize, wanted: ExtendOptions, *, workers: int) -> Conversion:
    """Return the conversion as that of another vocabulary."""
    init, files = wanted.init, dict[str, FileRef]()
    options: dict[str, Any] = {"to": wanted.size}
    if wanted.size > resize.model.vocab:
        options["init"] = init if isinstance(init, str) else "file"
        files = {} if isinstance(init, str) else {f"init/{init.name}": init}
    fields = {"vocabulary": {"before": resize.model.vocab, "after": wanted.size, "tensors": sorted(resize.names)}}
    conversion = replace(conversion, memory=conversion.memory + MEMORY + workers * PIECE_BYTES)  # new rows, before a cast
    return of_command(conversion, "extend-vocab", options=options, fields=fields, files=files)
