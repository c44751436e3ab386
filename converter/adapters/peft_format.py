"""PEFT's folders: `adapter_model.safetensors` with two or three tensors for each module, and `adapter_config.json`.

Names are PEFT's own: a prefix, the module, an ending. Which modules a model has is not known here.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from converter.adapters import peft_config
from converter.adapters.description import Base, Description
from converter.adapters.files import PEFT_PICKLE, PEFT_WEIGHTS
from converter.adapters.names import PREFIX, WEIGHT, Factor, factors, peft_name
from converter.adapters.opened import AdapterReader
from converter.adapters.peft_config import PeftConfig
from converter.plan import TensorPlan, as_stored, list_names
from formats.errors import UserError
from formats.folder import Folder
from formats.huggingface import HuggingFaceReader, Shard, make_header, parse_shard
from formats.spec import DTYPES, TensorSpec, dtype_name

FILE, PICKLED = PEFT_WEIGHTS, PEFT_PICKLE


@dataclass(frozen=True, slots=True)
class PeftAdapter:
    """An adapter in PEFT's files, and what its configuration says."""

    opened: AdapterReader
    reader: HuggingFaceReader
    config: PeftConfig


def open_peft(folder: Folder) -> PeftAdapter:
    """An adapter in PEFT's files. Raises UserError for what is missing, left over, of another shape, or not supported."""
    config = peft_config.read(folder)
    _check_file(folder)
    reader = HuggingFaceReader(folder, files=[FILE])
    try:
        parts = _parts(reader.specs, config)
    except UserError:
        reader.close()
        raise
    scales = {weight: config.scale(weight.removesuffix(WEIGHT)) for weight in parts}
    opened = AdapterReader(
        folder.label,
        _description(config),
        reader,
        parts,
        scales,
        asks_for=lambda weight: config.targets(weight.removesuffix(WEIGHT)),
        all_linear=config.target_modules == peft_config.ALL_LINEAR,
    )
    return PeftAdapter(opened, reader, config)


def _check_file(folder: Folder) -> None:
    """Raise UserError if the weights are not where PEFT writes them, and say where they are."""
    if folder.has(FILE):
        return
    if folder.has(PICKLED):
        raise UserError(
            f"`{folder.label}` has its weights in `{PICKLED}`, a pickle, which can run any program when it is opened",
            hint="if you trust it, load it with PEFT and save it again: `save_pretrained` writes safetensors",
        )
    other = [name for name in folder.children() if _WEIGHTS.fullmatch(name)]
    there = f", but {list_names(other)}" if other else ""
    raise UserError(
        f"`{folder.label}` has no `{FILE}`{there}",
        hint="another program wrote it: load it there and save it as PEFT's `save_pretrained` does"
        if other
        else "point at a folder that PEFT's `save_pretrained` wrote",
    )


_WEIGHTS = re.compile(r".*\.(safetensors|bin|pt|pth|ckpt|npz|gguf)")


def _description(config: PeftConfig) -> Description:
    wanted = config.target_modules
    return Description(
        method=config.method,
        dim=config.r,
        alpha=config.lora_alpha,
        use_rslora=config.use_rslora,
        canonical=True,
        dropout=config.lora_dropout,
        target_modules=(wanted,) if isinstance(wanted, str) else wanted,
        base=Base(config.base, "") if config.base else None,
    )


def _parts(specs: Mapping[str, TensorSpec], config: PeftConfig) -> dict[str, dict[Factor, TensorPlan]]:
    """The tensors by the weights that they change, in the order of their names."""
    wanted, made = factors(config.method), as_stored(_dimensioned(specs))
    weights = dict.fromkeys(f"{_module(name)}{WEIGHT}" for name in sorted(specs))
    if not weights:
        raise UserError(f"`{FILE}` holds no tensors")
    missing = [name for weight in weights for factor in wanted if (name := peft_name(weight, factor)) not in specs]
    if missing:
        raise UserError(
            f"`{FILE}` lacks {list_names(missing)}", hint=f"a {config.method} has {len(wanted)} tensors for each module"
        )
    found = {weight: {factor: made[peft_name(weight, factor)] for factor in wanted} for weight in weights}
    used = {tensor_plan.spec.name for tensor_plans in found.values() for tensor_plan in tensor_plans.values()}
    over = sorted(specs.keys() - used)
    if over:
        raise UserError(f"`{FILE}` holds {list_names(over)}, which a {config.method} does not have", hint="see `use_dora`")
    for weight, tensor_plans in found.items():
        _check(weight.removesuffix(WEIGHT), {factor: tensor_plan.spec for factor, tensor_plan in tensor_plans.items()}, config)
    return found


def _dimensioned(specs: Mapping[str, TensorSpec]) -> Mapping[str, TensorSpec]:
    for name, spec in specs.items():
        if not spec.shape or 0 in spec.shape:
            raise UserError(
                f"`{name}` has shape {list(spec.shape)}",
                hint="PEFT saves such tensors from sharded models whose weights were not gathered",
            )
    return specs


def _module(name: str) -> str:
    """`model.layers.0.self_attn.q_proj` of `base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight`."""
    for factor in Factor:
        ending = f".{factor.value[1]}"
        if name.startswith(PREFIX) and name.endswith(ending):
            return name.removeprefix(PREFIX).removesuffix(ending)
    _refuse_other_writers(name)
    raise UserError(
        f"`{FILE}` holds `{name}`, which is no tensor of a LoRA on a linear layer",
        hint="embeddings, biases and modules that were trained whole are not supported: merge the adapter with PEFT "
        "(`merge_and_unload`) and convert the merged model",
    )


_NAMED = re.compile(r".+\.(lora_[AB]|lora_magnitude_vector)\.(?P<adapter>(?!weight$|bias$)[^.]+)(?P<after>\.weight)?")
_ENDING = re.compile(r"(?P<module>.+)\.(lora_[AB]\.weight|lora_magnitude_vector)")


def _refuse_other_writers(name: str) -> None:
    """Raise UserError for a LoRA tensor as other programs than PEFT's `save_pretrained` name it, and say how to rename it."""
    found = _NAMED.fullmatch(name)
    if found:
        adapter = found["adapter"]
        raise _renamed(
            f"`{FILE}` holds `{name}`, with the name of the adapter (`{adapter}`) in it, which PEFT's files do not have",
            f'n.replace(".{adapter}.weight", ".weight").removesuffix(".{adapter}")',
        )
    if _ENDING.fullmatch(name):
        start = re.match(r"(.*?)(model\.)*(?=layers\.\d+\.|lm_head\b|embed_tokens\b)", name)
        there, model = (start[1], "" if "lm_head" in name else "model.") if start else ("", "")
        wrong = f"the prefix `{start[0]}`" if start and start[0] else "no prefix"
        raise _renamed(
            f"`{FILE}` holds `{name}`, with {wrong} where PEFT has `{PREFIX}{model}`",
            f'"{PREFIX}{model}" + n.removeprefix("{start[0] if start else there}")',
        )


def _renamed(what: str, new: str) -> UserError:
    text = f'`save_file({{{new}: t for n, t in load_file("{FILE}").items()}}, "{FILE}", {{"format": "pt"}})`'
    return UserError(what, hint=f"rename its tensors as PEFT's `save_pretrained` does: {text} of `safetensors.torch`")


def _check(module: str, specs: Mapping[Factor, TensorSpec], config: PeftConfig) -> None:
    """Raise UserError where shapes do not go together, or PEFT would not load them."""
    a, b, rank = specs[Factor.A], specs[Factor.B], config.rank(module)
    rows, columns = b.shape[0], a.shape[-1]
    for factor, spec in specs.items():
        should = factor.shape(rows, columns, rank)
        if spec.shape != should:
            raise UserError(
                f"`{spec.name}` has shape {list(spec.shape)}, with rank {rank} it should be {list(should)}",
                hint=f"either the weights or `{peft_config.FILE}` are of another adapter",
            )
    if not config.targets(module):
        raise UserError(
            f"`{FILE}` holds an adapter for `{module}`, which `target_modules` in `{peft_config.FILE}` leaves out",
            hint="PEFT would not load it: either the weights or the configuration are of another adapter",
        )


def make_shard(specs: Iterable[TensorSpec]) -> dict[str, Shard]:
    """The file for these tensors, which lie in it as safetensors sorts them: by dtype, then by name."""
    ordered = sorted(specs, key=lambda spec: (-spec.dtype.itemsize, _ORDER.index(dtype_name(spec.dtype)), spec.name))
    return {FILE: parse_shard(make_header(ordered), source=FILE)}


_ORDER = tuple(DTYPES)
