"""A bias of attention's output projection in a model whose other layers have none (Phi-3.5 MoE): megatron-core has one switch for
all, which reaches routers and experts."""

from __future__ import annotations

from typing import Any

from trainer.layers.spec import attention_parts


def attention_output_bias(provider: Any, layer: Any) -> None:
    """Give the output projection of a layer's attention a bias, if `provider.attention_output_bias` is set."""
    if provider.attention_output_bias:
        parts = attention_parts(layer)
        parts.linear_proj = _Biased(parts.linear_proj)


class _Biased:
    """A builder of a projection that always has a bias."""

    def __init__(self, linear: Any) -> None:
        self.linear = linear

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.linear(*args, **{**kwargs, "bias": True})
