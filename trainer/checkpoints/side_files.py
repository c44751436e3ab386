"""The files saved with a checkpoint's weights, so that it can be exported with nothing else: the model's `config.json`, its
tokenizer and other side files, `run_config.yaml` for Megatron-Bridge, and the run's own settings.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from tempfile import TemporaryFile
from typing import IO, Any

import torch.distributed as dist
from megatron.core import parallel_state

from converter import families, run_config, side_files
from converter.adapter_files import DESCRIPTION
from converter.adapters.adapter import Base
from converter.adapters.megatron import encode_description
from converter.config import to_megatron
from converter.config_hybrid import hybrid_fields
from converter.hybrid import GPT, HYBRID
from converter.layout import make_layout
from converter.megatron_settings import Effect, effect_of
from converter.model import Model
from converter.sources import open_source
from formats.detect import detect, open_huggingface
from formats.folder import BAND_BYTES, FileRef, Folder
from formats.iterations import find_iteration
from formats.spec import DTYPES
from trainer import tokenizers
from trainer.checkpoints import adapters, iterations, live
from trainer.config import RunConfig, TokenizerConfig
from trainer.dtypes import DTYPE_NAMES
from trainer.layers.pattern import is_hybrid, layers_of_each, symbols
from trainer.model import GPTModelProvider
from trainer.settings import hf_config, yaml_io

_CONFIG = f"{side_files.FILES}/{side_files.CONFIG}"


def collect(
    config: RunConfig, chunks: Sequence[Any], *, resumed: Path | None, base: Base | None = None
) -> Callable[[Path], None]:
    """Return the function that writes the files into an iteration's folder, on rank 0. All ranks call this.

    Sources are read once, here: when a checkpoint is saved the source may be gone, above all an older checkpoint of this run.
    `base` is the base model of adapters.
    """
    stages = _stages(chunks)
    source = str(resumed) if resumed else (config.checkpoint.pretrained_checkpoint or getattr(config.model, "hf_source", None))
    files, extras = _from_source(source) if source else (_from_tokenizer(config.model, config.tokenizer), ())
    run = iterations.run_of(resumed) if resumed else iterations.new_run()
    files |= {iterations.OURS: iterations.signature(run) + yaml_io.dump(config).encode()}
    if config.peft is not None:
        layout = HYBRID if is_hybrid(config.model) else GPT
        files |= {DESCRIPTION: encode_description(adapters.describe(config.peft, base, layout=layout))}
    if isinstance(config.model, GPTModelProvider) and sum(stages) == config.model.num_layers * layers_of_each(config.model):
        files |= {run_config.FILE: _run_config(config.model, stages)}
    if hf_config.not_in_hf_config(config.model):
        files.pop(_CONFIG, None)
    elif config_json := _config_json(config.model):
        files |= _changed(files, config_json)

    if dist.get_rank() != 0 or not config.checkpoint.save:
        return lambda _folder: None
    return _writing(files, _spooled(extras, Path(config.checkpoint.save)))


def _writing(files: Mapping[str, bytes | FileRef], spooled: IO[bytes] | None) -> Callable[[Path], None]:
    """Return the function that writes these files and the spooled extras. What it writes is read now."""
    contents = {name: _bytes(file) for name, file in files.items()}

    def write(folder: Path) -> None:
        for name, content in contents.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(content)
        if spooled:
            spooled.seek(0)
            with (folder / side_files.EXTRAS).open("wb") as target:
                shutil.copyfileobj(spooled, target, BAND_BYTES)

    return write


def _spooled(blocks: Iterable[bytes | memoryview], folder: Path) -> IO[bytes] | None:
    """Return a file without a name that holds these blocks, on the disk of `folder`; None if there are none. Tensors that no
    Megatron model has may be larger than memory."""
    file = None
    for block in blocks:
        if file is None:
            folder.mkdir(parents=True, exist_ok=True)
            file = TemporaryFile(dir=folder)  # noqa: SIM115 - open as long as the run
        file.write(block)
    return file


def _bytes(file: bytes | FileRef) -> bytes:
    return file if isinstance(file, bytes) else file.get()


def _config_json(model: Any) -> dict[str, Any]:
    """Return the `config.json` of a model; empty for a model of one's own."""
    return getattr(model, "hf_config", None) or {}


def _changed(files: Mapping[str, bytes | FileRef], config_json: dict[str, Any]) -> dict[str, bytes]:
    """Return the model's `config.json` if it differs from the source's; an equal one keeps the bytes of the source."""
    source = files.get(_CONFIG)
    if source is not None and json.loads(_bytes(source)) == config_json:
        return {}
    return {_CONFIG: (json.dumps(config_json, indent=2) + "\n").encode()}


def _from_source(source: str) -> tuple[dict[str, bytes | FileRef], Iterable[bytes | memoryview]]:
    """Return the side files of a Hugging Face directory or of a Megatron checkpoint, and the file of extras in blocks."""
    folder = open_source(source, or_hub=True)
    if not detect(folder).is_megatron:
        reader = open_huggingface(folder, any_dtype=True)
        collected = side_files.collect(reader, live.plan_of(reader).extras)
        blocks = side_files.blocks_of(collected.extras, reader) if collected.extras else ()
        return {**collected.documents, **collected.copies}, blocks
    iteration = find_iteration(folder)
    files = {**_below(iteration, side_files.FOLDER), **_below(iteration, "tokenizer")}
    extras = files.pop(side_files.EXTRAS, None)
    return files, extras.bands() if isinstance(extras, FileRef) else ()


def _below(folder: Folder, name: str) -> dict[str, bytes | FileRef]:
    subfolder = folder.below(name)
    return {f"{name}/{file}": FileRef(subfolder, file) for file in subfolder.files()}


def _from_tokenizer(model: Any, tokenizer: TokenizerConfig) -> dict[str, bytes | FileRef]:
    """Return the tokenizer's files, for a model from scratch."""
    files: dict[str, bytes | FileRef] = {}
    if _config_json(model) and tokenizer.tokenizer_model:
        for name, data in tokenizers.load(tokenizer.tokenizer_model).files().items():
            files |= {f"tokenizer/{name}": data}
            files |= {f"{side_files.FILES}/{name}": data} if name != side_files.CONFIG else {}
    return files


def _run_config(model: GPTModelProvider, stages: Sequence[int]) -> bytes:
    """Return `run_config.yaml`: the settings of `config.json` and those that it cannot hold; without it, all of the model's."""
    config_json = model.hf_config
    family = families.find(config_json.get("model_type")) if config_json else None
    megatron = to_megatron(family.CONFIG, config_json) if family else _own_fields(model)
    layout = make_layout(
        _sizes(model),
        tp=model.tensor_model_parallel_size,
        pp=model.pipeline_model_parallel_size,
        vpp=model.virtual_pipeline_model_parallel_size or 1,
        pp_layout=stages,
        **({"ep": model.expert_model_parallel_size, "etp": model.expert_tensor_parallel_size} if model.num_moe_experts else {}),
    )
    dtype = DTYPES[DTYPE_NAMES[model.params_dtype]]
    settings = {**megatron, **hf_config.not_in_hf_config(model)}
    settings = hybrid_fields(settings) if layers_of_each(model) == 2 else settings
    return run_config.make(settings, layout, dtype, vocab_multiple=model.make_vocab_size_divisible_by)


def _own_fields(model: GPTModelProvider) -> dict[str, Any]:
    """Return the settings of a model that `run_config.yaml` can hold: all but those of how it is computed."""
    of_model = (Effect.FUNCTION, Effect.CONFIG, Effect.DEPENDENT)
    settings = {field.name: getattr(model, field.name) for field in fields(model) if effect_of(field.name) in of_model}
    plain = {name: value for name, value in settings.items() if _is_plain(value)}
    return {**plain, "activation_func": getattr(model.activation_func, "__name__", "unknown")}


def _is_plain(value: Any) -> bool:
    return value is None or isinstance(value, (bool, int, float, str, list))


def _sizes(model: GPTModelProvider) -> Model:
    heads = model.num_attention_heads
    return Model(
        layers=model.num_layers,
        hidden=model.hidden_size,
        heads=heads,
        groups=model.num_query_groups or heads,
        head_dim=model.kv_channels or model.hidden_size // heads,
        ffn=model.ffn_hidden_size or 4 * model.hidden_size,
        vocab=model.vocab_size,
        padded_vocab=model.padded_vocab_size,
        tied=model.share_embeddings_and_output_weights,
        **({"experts": model.num_moe_experts} if model.num_moe_experts else {}),
        **({"pattern": "".join(symbols(model))} if is_hybrid(model) else {}),
    )


def _stages(chunks: Sequence[Any]) -> list[int]:
    """Return the layers of each pipeline stage: all ranks of the first virtual stage, then the second."""
    num_layers = [len(decoder.layers) if (decoder := getattr(chunk, "decoder", None)) is not None else 0 for chunk in chunks]
    group = parallel_state.get_pipeline_model_parallel_group()
    everywhere: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(everywhere, num_layers, group=group)
    return [counts[stage] for stage in range(len(num_layers)) for counts in everywhere]
