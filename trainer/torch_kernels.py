"""What kernels of other packages compute for gated delta nets and Mamba, in plain torch: differentiable, on any device."""

from __future__ import annotations

import torch


def causal_conv1d(
    x: torch.Tensor,
    weight: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    activation: str | None = None,
    initial_state: torch.Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: torch.Tensor | None = None,
) -> tuple[torch.Tensor, None]:
    """Return the convolution of each channel of [batch, sequence, channels] with its own `weight` [channels, width], of which the
    last multiplies the present token, and no state (`fla.modules.convolution.causal_conv1d`).

    Computed in fp32. `activation` is `silu`, `swish` or None. States and packed rows are not implemented.
    """
    if initial_state is not None or output_final_state or cu_seqlens is not None:
        raise NotImplementedError("states and packed rows")
    channels, width = weight.shape
    rows = torch.nn.functional.pad(x.float().transpose(1, 2), (width - 1, 0))
    bias = None if bias is None else bias.float()
    convolved = torch.nn.functional.conv1d(rows, weight.float().unsqueeze(1), bias, groups=channels).transpose(1, 2)
    return (torch.nn.functional.silu(convolved) if activation in ("silu", "swish") else convolved).type_as(x), None


def l2norm(x: torch.Tensor, eps: float = 1e-6) -> torch.Tensor:
    """Return vectors along the last axis divided by √(Σ x² + eps), computed in fp32 (`fla.modules.l2norm.l2norm`)."""
    exact = x.float()
    return (exact * torch.rsqrt(exact.square().sum(-1, keepdim=True) + eps)).type_as(x)
