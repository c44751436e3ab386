"""Settings that contradict others, or ask for what is not installed: errors, where one would silently win.

Knows what megatron-core derives from what. Shapes and layouts are `checks`'.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

from formats.errors import UserError
from trainer.config import RunConfig


def check(config: RunConfig) -> None:
    """Settings that would be overwritten by what others say, or that contradict them."""
    if config.ddp.average_in_collective and getattr(config.model, "calculate_per_token_loss", False):
        raise UserError(
            "`ddp.average_in_collective` is `True`, but gradients are divided by the tokens that count in the global batch "
            "(`model.calculate_per_token_loss`)",
            hint="leave `ddp.average_in_collective` out",
        )
    _check_width(config.model)


def _check_width(model: Any) -> None:
    width, base = getattr(model, "mup_width_mult", 1.0), getattr(model, "mup_base_hidden_size", None)
    follows = model.hidden_size / base if getattr(model, "use_mup", False) and base else 1.0
    if width not in (1.0, follows):
        raise UserError(
            f"`model.mup_width_mult` is `{width}`, but it follows from `model.hidden_size` and `model.mup_base_hidden_size`: "
            f"`{follows}`",
            hint="leave `model.mup_width_mult` out",
        )


def check_deterministic(model: Any) -> None:
    """Nothing is asked for that gives other bits each time."""
    if getattr(model, "deterministic_mode", False) and getattr(model, "cross_entropy_loss_fusion", False):
        raise UserError(
            "`model.deterministic_mode` is `True`, and so is `model.cross_entropy_loss_fusion`, which gives other bits each time",
            hint="leave one of them out",
        )


def check_kernels(config: RunConfig) -> None:
    """A kernel that is asked for is installed."""
    if getattr(config.model, "gradient_accumulation_fusion", False) and not find_spec("fused_weight_gradient_mlp_cuda"):
        raise UserError(
            "`model.gradient_accumulation_fusion` is `True`, and APEX, which has its kernel, is not installed",
            hint="leave `model.gradient_accumulation_fusion` out",
        )
