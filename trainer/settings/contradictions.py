"""Refuse settings that contradict others, or ask for what is not installed: one of them would silently win.

Knows which fields megatron-core derives from which. Shapes and layouts are left to `checks`.
"""

from __future__ import annotations

from typing import Any

from trainer.config import DistributedDataParallelConfig
from trainer.settings.rules import enforce


def check(model: Any, ddp: DistributedDataParallelConfig, *, mixed_precision: str) -> None:
    """Refuse settings that would be overwritten by others, or that contradict them."""
    width, derived = getattr(model, "mup_width_mult", 1.0), _width_mult(model)
    enforce((
        (
            ddp.average_in_collective and getattr(model, "calculate_per_token_loss", False),
            ("`ddp.average_in_collective` is `True`, but gradients are divided by the tokens that count in the global batch "
            "(`model.calculate_per_token_loss`)"),
            "leave `ddp.average_in_collective` out",
        ),
        (
            width not in (1.0, derived),
            (f"`model.mup_width_mult` is `{width}`, but it follows from `model.hidden_size` and `model.mup_base_hidden_size`: "
            f"`{derived}`"),
            "leave `model.mup_width_mult` out",
        ),
        (
            getattr(model, "fp8_output_proj", False) and not (model.fp8 and model.fp8_recipe == "mxfp8"),
            f"`model.fp8_output_proj` is `True`, which needs MXFP8; `mixed_precision` is `{mixed_precision}`",
            "leave `model.fp8_output_proj` out, or set `mixed_precision=bf16_with_mxfp8_mixed`",
        ),
    ))  # fmt: skip


def _width_mult(model: Any) -> float:
    """Return muP's width multiplier as megatron-core derives it."""
    base = getattr(model, "mup_base_hidden_size", None)
    return model.hidden_size / base if getattr(model, "use_mup", False) and base else 1.0


def check_deterministic(model: Any) -> None:
    """Refuse fused kernels that give other bits each time, in deterministic mode."""
    both = getattr(model, "deterministic_mode", False) and getattr(model, "cross_entropy_loss_fusion", False)
    message = (
        "`model.deterministic_mode` is `True`, and so is `model.cross_entropy_loss_fusion`, which gives other bits each time"
    )
    enforce([(both, message, "leave one of them out")])
