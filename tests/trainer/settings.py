"""Run configurations to start tests from."""

from __future__ import annotations

from typing import Any

from tests.models import BASE, VARIANTS
from trainer.config import RunConfig
from trainer.model import from_hf_config
from trainer.settings.precision import Machine
from trainer.settings.resolve import Resolved, resolve

HOPPER = Machine("gpu", capability=(9, 0), transformer_engine="2.20.2", cuda="13.0")
LLAMA = {**BASE, "model_type": "llama", "architectures": ["LlamaForCausalLM"]}

TP, PP, VPP = (
    "model__tensor_model_parallel_size",
    "model__pipeline_model_parallel_size",
    "model__virtual_pipeline_model_parallel_size",
)
CP, SP, EP = "model__context_parallel_size", "model__sequence_parallel", "model__expert_model_parallel_size"


def settings(variant: str = "gqa", **changes: Any) -> RunConfig:
    """A run of a tiny Llama that can start; `changes` are paths with `__` for the dot: `model__num_layers=2`."""
    config = RunConfig(model=from_hf_config({**LLAMA, **VARIANTS[variant]}))
    config.optimizer.lr = 1e-3
    config.dataset.sequence_length = 128
    for path, value in changes.items():
        *steps, name = path.split("__")
        part: Any = config
        for step in steps:
            part = getattr(part, step)
        assert hasattr(part, name), path
        setattr(part, name, value)
    return config


def resolved(*, world_size: int = 1, device: str = "gpu", **changes: Any) -> Resolved:
    """Resolve a run of these settings, on a Hopper GPU unless on the CPU."""
    return resolve(settings(**changes), world_size=world_size, device=device, machine=HOPPER if device == "gpu" else None)
