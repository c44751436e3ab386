"""Named precision recipes: the fields that a name decides on model, optimizer and gradient buffers, and the machine it needs.

The names are Megatron-Bridge's. Of shapes, knows only the multiples that FP8 needs.

A name decides its fields. An explicit field with another value contradicts it and is refused, except for the few fields under
`Precision.starting`, where the explicit value stays. A field that has its class's default contradicts nothing.
"""

from __future__ import annotations

import difflib
import importlib.metadata
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from megatron.core.fp8_utils import get_fp8_align_size

from formats.errors import UserError
from trainer.settings.defaults import Default, apply_defaults, changed_value, explicit_value, holder_and_field


@dataclass(frozen=True, slots=True)
class Requirement:
    """The machine that a precision needs. Versions are tuples to compare: (2, 3)."""

    cpu: bool = False
    capability: tuple[int, int] | None = None
    transformer_engine: tuple[int, int] | None = None
    cuda: tuple[int, int] | None = None
    multiple: int = 1
    """Tokens per rank and each matrix dimension must be multiples of this."""


@dataclass(frozen=True, slots=True)
class Precision:
    """The fields that a precision decides, by section of the run's configuration."""

    model: Mapping[str, Any]
    optimizer: Mapping[str, Any]
    ddp: Mapping[str, Any]
    needs: Requirement
    starting: Mapping[str, Any] = field(default_factory=dict)
    """Settings that are chosen unless they are explicit."""

    low_precision_weights: bool = False
    """Whether weights are kept in FP8 where the distributed optimizer holds their fp32 masters."""


@dataclass(frozen=True, slots=True)
class Machine:
    """The machine as this process sees it. None for what it cannot see: a login node has no GPU."""

    device: str
    capability: tuple[int, int] | None = None
    transformer_engine: str | None = None
    cuda: str | None = None


_UNQUANTIZED = {"fp8": None, "fp8_recipe": "delayed", "fp8_param": False, "fp4": None, "fp4_recipe": "nvfp4", "fp4_param": False}


def _plain(dtype: torch.dtype, *, grad_reduce_in_fp32: bool, cpu: bool, capability: tuple[int, int] | None = None) -> Precision:
    kind = {"fp16": dtype == torch.float16, "bf16": dtype == torch.bfloat16, "params_dtype": dtype}
    computed = {"pipeline_dtype": dtype, "autocast_dtype": dtype}
    return Precision(
        model={**kind, **computed, **_UNQUANTIZED},
        optimizer={**kind, "fp8_recipe": None},
        ddp={"fp8_param_gather": False, "fp4_param_gather": False},
        starting={
            "ddp.grad_reduce_in_fp32": grad_reduce_in_fp32,
        },
        needs=Requirement(cpu=cpu, capability=capability),
    )


_BF16 = _plain(torch.bfloat16, grad_reduce_in_fp32=True, cpu=True, capability=(8, 0))


def _fp8(kind: str, *, recipe: str, needs: Requirement, weights: bool, **starting: Any) -> Precision:
    return Precision(
        model={**_BF16.model, "fp8": kind, "fp8_recipe": recipe},
        optimizer={**_BF16.optimizer, "fp8_recipe": recipe if weights else None},
        ddp=_BF16.ddp,
        starting={**_BF16.starting, **{f"model.{name}": value for name, value in starting.items()}},
        needs=needs,
        low_precision_weights=weights,
    )


PRECISIONS: dict[str, Precision] = {
    "fp32": _plain(torch.float32, grad_reduce_in_fp32=False, cpu=True),
    "bf16_mixed": _BF16,
    "fp16_mixed": _plain(torch.float16, grad_reduce_in_fp32=False, cpu=False, capability=(7, 0)),
    "bf16_with_fp8_delayed_scaling_mixed": _fp8(
        "hybrid",
        recipe="delayed",
        weights=True,
        fp8_amax_history_len=1024,
        fp8_amax_compute_algo="max",
        needs=Requirement(capability=(8, 9), transformer_engine=(1, 0), cuda=(12, 1), multiple=get_fp8_align_size("delayed")),
    ),
    "bf16_with_fp8_current_scaling_mixed": _fp8(
        "hybrid",
        recipe="tensorwise",
        weights=True,
        first_last_layers_bf16=True,
        needs=Requirement(capability=(8, 9), transformer_engine=(2, 2), cuda=(12, 1), multiple=get_fp8_align_size("tensorwise")),
    ),
    "bf16_with_fp8_subchannel_scaling_mixed": _fp8(
        "hybrid",
        recipe="blockwise",
        weights=False,
        needs=Requirement(capability=(9, 0), transformer_engine=(2, 3), cuda=(12, 9), multiple=get_fp8_align_size("blockwise")),
    ),
    "bf16_with_mxfp8_mixed": _fp8(
        "e4m3",
        recipe="mxfp8",
        weights=False,
        needs=Requirement(capability=(10, 0), transformer_engine=(2, 1), cuda=(12, 8), multiple=get_fp8_align_size("mxfp8")),
    ),
    "bf16_with_nvfp4_mixed": Precision(
        model={**_BF16.model, "fp4": "e2m1", "fp4_recipe": "nvfp4"},
        optimizer=_BF16.optimizer,
        ddp=_BF16.ddp,
        starting=_BF16.starting,
        needs=Requirement(capability=(10, 0), transformer_engine=(2, 7), cuda=(12, 8), multiple=32),
    ),
}
"""Formats, scaling, amax history and bf16 layers as in Megatron-Bridge's recipes of these names; capabilities and CUDA versions
from Transformer Engine's `check_*_support`; its versions from megatron-core's fp8_utils and fp4_utils; multiples from
megatron-core's `get_fp8_align_size`, and for FP4 the 32 values of one 16-byte row that its `get_fp4_align_size` explains.
MXFP8 and blockwise keep bf16 weights: MXFP8 weights would share the gradients' buffer, which needs another training step."""


def find(name: str) -> Precision:
    """Return the precision of a name. Raises UserError with the nearest name for an unknown one."""
    if name in PRECISIONS:
        return PRECISIONS[name]
    near = difflib.get_close_matches(name.replace("-", "_"), PRECISIONS, n=1, cutoff=0.5)
    raise UserError(
        f"there is no precision `{name}`",
        hint=f"did you mean `{near[0]}`?" if near else f"one of: {', '.join(PRECISIONS)}",
    )


def requires(name: str) -> Requirement:
    """Return what a precision needs."""
    return find(name).needs


def apply(name: str, config: Any) -> list[Default]:
    """Set a precision's fields on `config.model`, `config.optimizer` and `config.ddp`. Returns what changed.

    Raises UserError where an explicit field contradicts the name.
    """
    chosen = find(name)
    decided = {f"{part}.{key}": value for part in ("model", "optimizer", "ddp") for key, value in getattr(chosen, part).items()}
    decided |= _weights(chosen, config.ddp)
    for setting, value in decided.items():
        _agree(config, setting, value, name=name)
    free = {setting: value for setting, value in chosen.starting.items() if explicit_value(config, setting) is None}
    why = f"`mixed_precision={name}`"
    defaults = {setting: value for setting, value in (decided | free).items() if hasattr(*holder_and_field(config, setting))}
    return apply_defaults(config, [Default(setting, value, why) for setting, value in defaults.items()])


def _weights(chosen: Precision, ddp: Any) -> dict[str, bool]:
    """Choose FP8 weights where `ddp.fp8_param_gather` is set: half the bytes to hold and to gather, but their transposes are
    computed for each microbatch. megatron-core gathers them only from the distributed optimizer."""
    if not chosen.low_precision_weights:
        return {}
    in_fp8 = ddp.fp8_param_gather and ddp.use_distributed_optimizer
    return {"model.fp8_param": in_fp8, "ddp.fp8_param_gather": in_fp8}


def _agree(config: Any, setting: str, value: Any, *, name: str) -> None:
    explicit = changed_value(config, setting)
    if explicit is not None and explicit != value:
        raise UserError(
            f"`{setting}` is `{explicit}`, but `mixed_precision={name}` makes it `{value}`",
            hint=f"leave `{setting}` out, or choose another `mixed_precision`",
        )
    part, field_name = holder_and_field(config, setting)
    if not hasattr(part, field_name) and value not in (None, False, torch.float32) and field_name in ("fp8", "fp4"):
        raise UserError(
            f"the model has no field `{field_name}`, which `mixed_precision={name}` sets", hint="choose `bf16_mixed` for it"
        )


def find_machine(device: str) -> Machine:
    """Return what this process sees of the machine, for a run on `cpu` or `gpu`."""
    seen = device == "gpu" and torch.cuda.is_available()
    return Machine(
        device=device,
        capability=torch.cuda.get_device_capability() if seen else None,
        transformer_engine=_version("transformer_engine"),
        cuda=torch.version.cuda,
    )


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def check(name: str, machine: Machine) -> None:
    """Raise UserError where the machine lacks what a precision needs.

    Passes for a run on GPUs where this process sees none: the processes of the run check again.
    """
    needs = requires(name)
    if machine.device == "cpu":
        if not needs.cpu:
            raise UserError(
                f"precision `{name}` needs a GPU, and this run is on the CPU",
                hint=f"choose one of: {', '.join(able for able, kind in PRECISIONS.items() if kind.needs.cpu)}",
            )
        return
    if machine.capability is None:
        return
    _check_capability(name, needs, machine.capability)
    for package, least, version in (
        ("Transformer Engine", needs.transformer_engine, machine.transformer_engine),
        ("CUDA", needs.cuda, machine.cuda),
    ):
        _check_version(name, package, least=least, version=version)


def _check_capability(name: str, needs: Requirement, capability: tuple[int, int]) -> None:
    if needs.capability and capability < needs.capability:
        able = [precision for precision, kind in PRECISIONS.items() if (kind.needs.capability or (0, 0)) <= capability]
        raise UserError(
            f"precision `{name}` needs a GPU of compute capability `{_dotted(needs.capability)}` or higher; "
            f"this one has `{_dotted(capability)}`",
            hint=f"this GPU can do: {', '.join(able)}",
        )


def _check_version(name: str, package: str, *, least: tuple[int, int] | None, version: str | None) -> None:
    if least is None:
        return
    if version is None:
        raise UserError(
            f"precision `{name}` needs {package} `{_dotted(least)}` or newer, which is not installed",
            hint="`pip install 'mbtools[gpu]'`, or choose `mixed_precision=bf16_mixed`",
        )
    if tuple(map(int, re.findall(r"\d+", version)[:2])) < least:
        raise UserError(
            f"precision `{name}` needs {package} `{_dotted(least)}` or newer; this is `{version}`",
            hint=f"install a newer {package}, or choose `mixed_precision=bf16_mixed`",
        )


def _dotted(version: tuple[int, int]) -> str:
    return f"{version[0]}.{version[1]}"
