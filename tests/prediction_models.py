"""Layers of multi-token prediction of the model that `mbtrain` builds, on ranks without a GPU."""

from __future__ import annotations

from typing import Any

from tests.family_models import build
from tests.megatron_cpu import forward, load_strictly


def logits_of(rank: int, config: dict, settings: dict, iteration: str, tokens: list[list[int]]) -> Any:
    """Load a checkpoint strictly and run it.

    Answers (keys nobody asked for, logits of the model and of each further layer [layer, batch, sequence, padded vocabulary] as a
    numpy array on the last stage, else None).
    """
    from trainer import cpu_backend

    with cpu_backend.activate():  # for the streams of token dispatchers
        return _logits_of(config, settings, iteration, tokens)


def _logits_of(config: dict, settings: dict, iteration: str, tokens: list[list[int]]) -> Any:
    import torch

    chunks = build(config, **settings)
    left, hidden = load_strictly(chunks, iteration), []
    if getattr(chunks[-1], "mtp", None) is not None:
        chunks[-1].mtp.register_forward_hook(lambda _module, _inputs, output: hidden.append(output))
    forward(chunks, tokens, runtime_gather_output=True)
    if not hidden:
        return left, None
    with torch.no_grad():
        parts = hidden[0].chunk(1 + chunks[-1].config.mtp_num_layers)
        logits = [chunks[-1].output_layer(part, runtime_gather_output=True)[0].transpose(0, 1) for part in parts]
    return left, torch.stack(logits).numpy()
