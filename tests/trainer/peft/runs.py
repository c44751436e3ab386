"""Runs with adapters on a rank, and the same training by PEFT, transformers and torch."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch

from tests.trainer import small
from tests.trainer.small import BATCH, STEPS
from tests.trainer.test_parity import rate_of

DIM, ALPHA = 4, 8
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "tp1": (1, {}),
    "tp2": (2, {"model__tensor_model_parallel_size": 2}),
    "pp2": (2, {"model__pipeline_model_parallel_size": 2}),
}
ONE_STEP = {"train__train_iters": 1, "scheduler__lr_decay_iters": STEPS}
"""At learning rate 0, where the warm-up starts."""
FULL = {
    "model__recompute_granularity": "full",
    "model__recompute_method": "uniform",
    "model__recompute_num_layers": 1,
}
_PLACES = {
    "self_attn.q_proj": "self_attention.linear_qkv.adapter.adapter_q",
    "self_attn.k_proj": "self_attention.linear_qkv.adapter.adapter_k",
    "self_attn.v_proj": "self_attention.linear_qkv.adapter.adapter_v",
    "self_attn.o_proj": "self_attention.linear_proj.adapter",
    "mlp.gate_proj": "mlp.linear_fc1.adapter.adapter_gate",
    "mlp.up_proj": "mlp.linear_fc1.adapter.adapter_up",
    "mlp.down_proj": "mlp.linear_fc2.adapter",
}
_DIVIDED = ("tensor_model_parallel", "partition_dim", "partition_stride")
_TENSORS = {"lora_A": "linear_in.weight", "lora_B": "linear_out.weight", "lora_magnitude_vector": "weight_magnitude"}


def by_peft(folder: Path, *, seed: int, zero_b: bool = True, **settings: Any) -> tuple[Any, dict[str, torch.Tensor]]:
    """A model with PEFT's adapters on all linear layers, and their tensors by the names that Megatron has for them."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    targets = [name.rpartition(".")[2] for name in _PLACES]
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated")  # PEFT asks transformers 5 for it
        model = get_peft_model(model, LoraConfig(r=DIM, lora_alpha=ALPHA, lora_dropout=0.0, target_modules=targets, **settings))
    if not zero_b:
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.05)
    trained = {name: parameter.detach().clone() for name, parameter in model.named_parameters() if parameter.requires_grad}
    return model, {megatron_name(name): tensor for name, tensor in trained.items()}


def megatron_name(name: str) -> str:
    """`base_model.model.model.layers.0.self_attn.q_proj.lora_A.default.weight`, as it is called in Megatron."""
    _, _, rest = name.partition(".layers.")
    layer, _, rest = rest.partition(".")
    module, _, tensor = rest.removesuffix(".weight").removesuffix(".default").rpartition(".")
    return f"decoder.layers.{layer}.{_PLACES[module]}.{_TENSORS[tensor]}"


def trained_by_torch(model: Any, *, b_rate: float = 1.0, steps: int = STEPS) -> tuple[list[float], list[float]]:
    """Losses and gradient norms of AdamW over the parameters that are trained; `b_rate` is LoRA+'s."""
    wanted = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    groups = [
        {
            "params": [parameter for name, parameter in wanted.items() if parameter.ndim > 1 and "lora_B" not in name],
            "times": 1.0,
        },
        {"params": [parameter for name, parameter in wanted.items() if "lora_B" in name], "times": b_rate},
        {"params": [parameter for parameter in wanted.values() if parameter.ndim == 1], "weight_decay": 0.0, "times": 1.0},
    ]
    optimizer = torch.optim.AdamW(groups, weight_decay=0.1, betas=(0.9, 0.95), eps=1e-8)
    samples = small.FixedTokens(model.config.vocab_size).build(None, 0, (10**6, 0, 0))[0]
    losses, norms = [], []
    for step in range(steps):
        batch = [samples[step * BATCH + i] for i in range(BATCH)]
        tokens, labels = (torch.stack([sample[name] for sample in batch]) for name in ("tokens", "labels"))
        loss = torch.nn.functional.cross_entropy(model(tokens).logits.flatten(0, 1), labels.flatten())
        optimizer.zero_grad()
        loss.backward()
        norms.append(torch.nn.utils.clip_grad_norm_(wanted.values(), 1.0).item())
        for group in optimizer.param_groups:
            group["lr"] = group["times"] * rate_of(step, steps=STEPS)
        optimizer.step()
        losses.append(loss.item())
    return losses, norms


class Watched(small.History):
    """Begins with given adapters, and keeps the gradients of the first step and what was trained."""

    def __init__(self, begin: dict[str, torch.Tensor] | None = None) -> None:
        super().__init__()
        self.begin, self.seen = begin, {}

    def on_start(self, run: Any) -> None:
        from trainer.peft import trainable

        parameters = dict(trainable(run.chunks))
        for name, parameter in parameters.items() if self.begin else ():
            parameter.data.copy_(mine(self.begin[name], parameter))
        assert all(hasattr(parameter, "main_grad") for parameter in parameters.values())
        self.frozen = [parameter for chunk in run.chunks for parameter in chunk.parameters() if not parameter.requires_grad]
        self.states = [len(optimizer.optimizer.state) if optimizer.optimizer else 0 for optimizer in _optimizers(run)]

    def on_step(self, run: Any, step: Any) -> None:
        from trainer.peft import trainable

        super().on_step(run, step)
        if not self.seen:
            self.seen = {
                name: (parameter.main_grad.clone().cpu(), *(getattr(parameter, what, False) for what in _DIVIDED))
                for name, parameter in trainable(run.chunks)
            }
        self.held = sum(len(optimizer.optimizer.state) for optimizer in _optimizers(run) if optimizer.optimizer)
        assert all(parameter.grad is None and not hasattr(parameter, "main_grad") for parameter in self.frozen)

    def on_end(self, run: Any) -> None:
        from trainer.peft import trainable

        self.weights = {name: parameter.detach().clone().cpu() for name, parameter in trainable(run.chunks)}


def _optimizers(run: Any) -> list[Any]:
    return getattr(run.parts.optimizer, "chained_optimizers", [run.parts.optimizer])


def mine(whole: torch.Tensor, parameter: Any) -> torch.Tensor:
    """This rank's part of a tensor."""
    from megatron.core import parallel_state

    if not parameter.tensor_model_parallel:
        return whole
    ranks, rank = parallel_state.get_tensor_model_parallel_world_size(), parallel_state.get_tensor_model_parallel_rank()
    halves = whole.chunk(parameter.partition_stride, dim=parameter.partition_dim)
    return torch.cat([half.chunk(ranks, parameter.partition_dim)[rank] for half in halves], dim=parameter.partition_dim)


def whole(parts: list[tuple[torch.Tensor, bool, int, int]]) -> torch.Tensor:
    """A tensor from what each tensor-parallel rank has of it; copies must be alike."""
    first, divided, axis, stride = parts[0]
    if not divided:
        for other, *_ in parts[1:]:
            torch.testing.assert_close(other, first)
        return first
    halves = [part.chunk(stride, dim=axis) for part, *_ in parts]
    return torch.cat([half[number] for number in range(stride) for half in halves], dim=axis)


def run(folder: str, changes: dict[str, Any], kind: str, settings: dict[str, Any], begin: Any = None) -> dict[str, Any]:
    """Train on this rank; what was seen."""
    from trainer import peft
    from trainer.loop import pretrain

    config = small.settings(Path(folder), **changes)
    config.peft = getattr(peft, kind)(**({"dim": DIM, "alpha": ALPHA} | settings))
    history = Watched(begin)
    pretrain(config, callbacks=[history])
    return {name: getattr(history, name) for name in ("losses", "grad_norms", "seen", "weights", "held")}
