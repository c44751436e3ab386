"""What PEFT makes of a tiny model: adapters with random weights, and what the model computes with them."""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

TOKENS = np.random.default_rng(5).integers(0, 384, (2, 24)).tolist()
EVERY = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
TOGETHER = (("self_attn", ("q_proj", "k_proj", "v_proj")), ("mlp", ("gate_proj", "up_proj")))


@contextmanager
def older_names() -> Iterator[None]:
    """PEFT asks transformers 5 for what has another name there, and looks for the names of parameters among modules."""
    with warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", "The following (rank|alpha)_pattern keys did not match any targeted module", RuntimeWarning
        )
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
        yield


@older_names()
def save_adapter(
    base: Path, folder: Path, *, dtype: str = "float32", equal_a: bool = False, seed: int = 1, **config: Any
) -> Path:
    """An adapter of every tensor random, saved by PEFT. `equal_a`: what Megatron fuses has one A."""
    import torch
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(seed)
    model = _model(base)
    config = {"r": 4, "lora_alpha": 8, "target_modules": EVERY, "task_type": "CAUSAL_LM", **config}
    adapted = get_peft_model(model, LoraConfig(**config))
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_A" in name or "lora_B" in name:
                parameter.normal_(0, 0.2)
            if "lora_magnitude_vector" in name:
                parameter.mul_(torch.rand_like(parameter) + 0.5)
        if equal_a:
            _share(adapted)
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.to(getattr(torch, dtype))
    adapted.save_pretrained(folder)
    return folder


def changed(folder: Path, target: Path, change: Callable[[dict[str, Any]], object]) -> Path:
    """A copy of an adapter, or of a model in one file, with other tensors."""
    from safetensors.torch import load_file, save_file

    shutil.copytree(folder, target)
    (file,) = target.glob("*.safetensors")
    tensors = load_file(file)
    change(tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, file, {"format": "pt"})
    return target


def _share(adapted: Any) -> None:
    for layer in adapted.base_model.model.model.layers:
        for part, names in TOGETHER:
            first, *others = (getattr(getattr(layer, part), name) for name in names)
            for other in (module for module in others if hasattr(first, "lora_A")):
                other.lora_A["default"].weight.copy_(first.lora_A["default"].weight)


@older_names()
def with_adapter(base: Path, folder: Path) -> Any:
    """The model with an adapter, as PEFT opens it."""
    from peft import PeftModel

    return PeftModel.from_pretrained(_model(base, attn_implementation="eager"), folder).eval()


def _model(base: Path, **options: str) -> Any:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

    with_towers = AutoConfig.from_pretrained(base).model_type == "mistral3"
    kind = AutoModelForImageTextToText if with_towers else AutoModelForCausalLM
    return kind.from_pretrained(base, dtype=torch.float32, **options)


def logits(model: Any) -> Any:
    import torch

    with torch.no_grad():
        return model(torch.tensor(TOKENS)).logits


def deltas(adapted: Any) -> dict[str, Any]:
    """What PEFT adds to each weight, without a magnitude."""
    return {
        f"{name.removeprefix('base_model.model.')}.weight": module.get_delta_weight("default")
        for name, module in adapted.named_modules()
        if hasattr(module, "get_delta_weight")
    }
