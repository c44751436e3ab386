"""PEFT's folders: `adapter_model.safetensors` with two or three tensors for each module, and `adapter_config.json`.

Names are PEFT's: a prefix, the module, an ending. Which modules a model has is not checked here.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from converter.adapter_files import PEFT_CONFIG, PEFT_PICKLE, PEFT_WEIGHTS
from converter.adapters import peft_config
from converter.adapters.adapter import AdapterReader, Base, Description
from converter.adapters.names import PREFIX, WEIGHT, Factor, factors, module_of, peft_name
from converter.adapters.parameters import IN_ORDER
from converter.adapters.peft_config import ALL_LINEAR, PeftConfig, as_tuple
from converter.plan import TensorPlan, as_stored, list_names
from formats.errors import UserError, format_untrusted
from formats.folder import Folder
from formats.huggingface import HuggingFaceReader, Shard, shard_of
from formats.spec import DTYPES, TensorSpec, dtype_name


@dataclass(frozen=True, slots=True)
class PeftAdapter:
    """An adapter in PEFT's files, and its configuration."""

    adapter: AdapterReader
    reader: HuggingFaceReader
    config: PeftConfig


def open_peft_adapter(folder: Folder) -> PeftAdapter:
    """Open an adapter in PEFT's files. Reads headers only.

    Raises UserError for a missing or unexpected tensor, a wrong shape, or an unsupported configuration.
    """
    config = peft_config.read(folder)
    _check_file(folder)
    reader = HuggingFaceReader(folder, files=[PEFT_WEIGHTS])
    try:
        parts = _group_by_weight(reader.specs, config)
    except UserError:
        reader.close()
        raise
    adapter = AdapterReader(
        folder.label,
        _describe(config),
        reader,
        parts,
        scales={weight: config.scale(module_of(weight)) for weight in parts},
        ranks={weight: config.rank(module_of(weight)) for weight in parts},
        is_requested=lambda weight: config.targets(module_of(weight)) or config.targets_parameter(weight),
        all_linear=config.target_modules == ALL_LINEAR,
        fan_in_fan_out=config.fan_in_fan_out,
    )
    return PeftAdapter(adapter, reader, config)


def _check_file(folder: Folder) -> None:
    """Raise UserError if the weights are not in PEFT's file, and name the file they may be in."""
    if folder.has(PEFT_WEIGHTS):
        return
    if folder.has(PEFT_PICKLE):
        raise UserError(
            f"`{folder.label}` has its weights in `{PEFT_PICKLE}`, a pickle, which can run any program when it is opened",
            hint="if you trust it, load it with PEFT and save it again: `save_pretrained` writes safetensors",
        )
    other = [name for name in folder.children() if _WEIGHTS.fullmatch(name)]
    raise UserError(
        f"`{folder.label}` has no `{PEFT_WEIGHTS}`" + (f", but {list_names(other)}" if other else ""),
        hint="another program wrote it: load it there and save it as PEFT's `save_pretrained` does"
        if other
        else "point at a folder that PEFT's `save_pretrained` wrote",
    )


_WEIGHTS = re.compile(r".*\.(safetensors|bin|pt|pth|ckpt|npz|gguf)")


def _describe(config: PeftConfig) -> Description:
    return Description(
        method=config.method,
        dim=config.r,
        alpha=config.lora_alpha,
        use_rslora=config.use_rslora,
        canonical=True,
        dropout=config.lora_dropout,
        target_modules=as_tuple(config.target_modules),
        base=Base(config.base, "") if config.base else None,
    )


def _group_by_weight(specs: Mapping[str, TensorSpec], config: PeftConfig) -> dict[str, dict[Factor, TensorPlan]]:
    """Return the tensors of each weight, sorted by name. Raises UserError for a missing, unexpected or misshapen tensor."""
    expected, plans = factors(config.method), as_stored(_refuse_empty(specs))
    modules = _modules_of([_adapted_module(name) for name in sorted(specs)], config)
    if not modules:
        raise UserError(f"`{PEFT_WEIGHTS}` holds no tensors")
    _check_parameters(modules, config)
    names = {weight: {factor: peft_name(module, factor) for factor in expected} for weight, module in modules.items()}
    used = [name for by_factor in names.values() for name in by_factor.values()]
    missing = [name for name in used if name not in specs]
    if missing:
        raise UserError(
            f"`{PEFT_WEIGHTS}` lacks {list_names(missing)}", hint=f"a {config.method} has {len(expected)} tensors for each module"
        )
    unexpected = sorted(specs.keys() - set(used))
    if unexpected:
        raise UserError(
            f"`{PEFT_WEIGHTS}` holds {list_names(unexpected)}, which a {config.method} does not have", hint="see `use_dora`"
        )
    for weight, by_factor in names.items():
        _check_shapes(weight, {factor: specs[name] for factor, name in by_factor.items()}, config)
    return {weight: {factor: plans[name] for factor, name in by_factor.items()} for weight, by_factor in names.items()}


def _modules_of(modules: Iterable[str], config: PeftConfig) -> dict[str, str]:
    """Return the weights of modules, each with its module. A parameter of all experts, `mlp.experts.down_proj`, is no module:
    PEFT wraps `mlp.experts` once for each, and calls the inner ones its `base_layer`."""
    module_of: dict[str, str] = {}
    for module in modules:
        owner = module.replace(".base_layer", "")
        names = next((names for end, names in IN_ORDER.items() if owner.endswith(f".{end}")), ())
        targeted = [name for name in names if config.targets_parameter(f"{owner}.{name}")]
        depth = module.count(".base_layer")
        module_of[f"{owner}.{targeted[-1 - depth]}" if depth < len(targeted) else f"{module}{WEIGHT}"] = module
    return module_of


def _check_parameters(weights: Iterable[str], config: PeftConfig) -> None:
    """Raise UserError for an entry of `target_parameters` without a tensor."""
    for target in config.target_parameters:
        if not any(f".{weight}".endswith(f".{target}") for weight in weights):
            raise UserError(
                f"`target_parameters` in `{PEFT_CONFIG}` has `{format_untrusted(target)}`, for which `{PEFT_WEIGHTS}` holds no "
                "tensors",
                hint="either the weights or the configuration are of another adapter",
            )


def _refuse_empty(specs: Mapping[str, TensorSpec]) -> Mapping[str, TensorSpec]:
    for name, spec in specs.items():
        if not spec.shape or 0 in spec.shape:
            raise UserError(
                f"`{name}` has shape {list(spec.shape)}",
                hint="PEFT saves such tensors from sharded models whose weights were not gathered",
            )
    return specs


def _adapted_module(name: str) -> str:
    """`model.layers.0.self_attn.q_proj` of `base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight`."""
    for factor in Factor:
        ending = f".{factor.value[1]}"
        if name.startswith(PREFIX) and name.endswith(ending):
            return name.removeprefix(PREFIX).removesuffix(ending)
    _refuse_other_writers(name)
    raise UserError(
        f"`{PEFT_WEIGHTS}` holds `{name}`, which is not a tensor of a LoRA on a linear layer",
        hint="embeddings, biases and modules that were trained whole are not supported: merge the adapter with PEFT "
        "(`merge_and_unload`) and convert the merged model",
    )


_WITH_ADAPTER_NAME = re.compile(r".+\.(lora_[AB]|lora_magnitude_vector)\.(?P<adapter>(?!weight$|bias$)[^.]+)(?P<after>\.weight)?")
_LORA_ENDING = re.compile(r"(?P<module>.+)\.(lora_[AB]\.weight|lora_magnitude_vector)")


def _refuse_other_writers(name: str) -> None:
    """Raise UserError for a LoRA tensor with the name that another program gives it, and say how to rename it."""
    match = _WITH_ADAPTER_NAME.fullmatch(name)
    if match:
        adapter = match["adapter"]
        raise _rename(
            f"`{PEFT_WEIGHTS}` holds `{name}`, with the name of the adapter (`{adapter}`) in it, which PEFT's files do not have",
            f'n.replace(".{adapter}.weight", ".weight").removesuffix(".{adapter}")',
        )
    if _LORA_ENDING.fullmatch(name):
        start = re.match(r"(.*?)(model\.)*(?=layers\.\d+\.|lm_head\b|embed_tokens\b)", name)
        prefix, model = (start[0], "" if "lm_head" in name else "model.") if start else ("", "")
        raise _rename(
            f"`{PEFT_WEIGHTS}` holds `{name}`, with {f'the prefix `{prefix}`' if prefix else 'no prefix'} where PEFT has "
            f"`{PREFIX}{model}`",
            f'"{PREFIX}{model}" + n.removeprefix("{prefix}")',
        )


def _rename(message: str, new: str) -> UserError:
    text = f'`save_file({{{new}: t for n, t in load_file("{PEFT_WEIGHTS}").items()}}, "{PEFT_WEIGHTS}", {{"format": "pt"}})`'
    return UserError(message, hint=f"rename its tensors as PEFT's `save_pretrained` does: {text} of `safetensors.torch`")


def _check_shapes(weight: str, specs: Mapping[Factor, TensorSpec], config: PeftConfig) -> None:
    """Raise UserError for shapes that do not match each other or the rank, and for a module that PEFT would not load."""
    module, fused = module_of(weight), not weight.endswith(WEIGHT)
    rows, columns, rank = specs[Factor.B].shape[0], specs[Factor.A].shape[-1], config.rank(module)
    rank *= max(1, specs[Factor.A].shape[0] // rank) if fused else 1  # of all experts together
    for factor, spec in specs.items():
        expected = factor.shape(rows, columns, rank)
        if spec.shape != expected:
            raise UserError(
                f"`{spec.name}` has shape {list(spec.shape)}, with rank {rank} it should be {list(expected)}",
                hint=f"either the weights or `{PEFT_CONFIG}` are of another adapter",
            )
    if not (fused or config.targets(module)):
        raise UserError(
            f"`{PEFT_WEIGHTS}` holds an adapter for `{module}`, which `target_modules` in `{PEFT_CONFIG}` leaves out",
            hint="PEFT would not load it: either the weights or the configuration are of another adapter",
        )


def make_shard(specs: Iterable[TensorSpec]) -> dict[str, Shard]:
    """Return the file for these tensors, in the order in which safetensors stores them: by dtype, then by name."""
    ordered = sorted(specs, key=lambda spec: (-spec.dtype.itemsize, _ORDER.index(dtype_name(spec.dtype)), spec.name))
    return {PEFT_WEIGHTS: shard_of(ordered)}


_ORDER = tuple(DTYPES)
