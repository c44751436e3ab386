"""The model that `mbtrain` builds of a family's `config.json`, on ranks without a GPU."""

from __future__ import annotations

from typing import Any

from tests.megatron_cpu import forward, load_strictly

ON_CPU = {
    "use_cpu_initialization": True,
    "masked_softmax_fusion": False,
    "bias_activation_fusion": False,
    "bias_dropout_fusion": False,
    "apply_rope_fusion": False,
    "persist_layer_norm": False,
    "cross_entropy_loss_fusion": False,
}
"""What `mbtrain` chooses on a CPU."""


def build(config: dict, **settings: Any) -> list[Any]:
    """This rank's chunks in fp32, in evaluation mode; parallel state is set up for the settings."""
    import torch
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

    from trainer.model import build, from_hf_config

    provider = from_hf_config(config)
    for name, value in {**ON_CPU, "pipeline_dtype": torch.float32, **settings}.items():
        setattr(provider, name, value)
    parallel_state.initialize_model_parallel(provider.tensor_model_parallel_size, provider.pipeline_model_parallel_size)
    model_parallel_cuda_manual_seed(1)
    provider.finalize()
    return [chunk.eval() for chunk in build(provider)]


def logits_of(rank: int, model: tuple[dict, dict, str], iteration: str, tokens: list[list[int]]) -> Any:
    """Load a checkpoint strictly and run it.

    `model` is a `config.json`, settings of `mbtrain`, and a folder of further family files.

    Answers (keys nobody asked for, logits [batch, sequence, padded vocabulary] as a numpy array on the last stage, else None).
    """
    from converter import families as registry

    config, settings, families = model
    registry.__path__ = [*([families] if families else []), *registry.__path__]
    chunks = build(config, **settings)
    return load_strictly(chunks, iteration), forward(chunks, tokens, runtime_gather_output=True)
