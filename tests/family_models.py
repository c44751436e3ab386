"""The model that `mbtrain` builds of a family's `config.json`, on ranks without a GPU."""

from __future__ import annotations

from typing import Any

from tests.megatron_cpu import forward, load_strictly


def build(config: dict, **settings: Any) -> list[Any]:
    """This rank's chunks in fp32, in evaluation mode; parallel state is set up for the settings."""
    import torch
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

    from trainer.model import build, from_hf_config
    from trainer.settings.kernels import WITHOUT_CUDA
    from trainer.settings.values import activation

    provider = from_hf_config(config)
    if isinstance(settings.get("activation_func"), str):
        settings["activation_func"] = activation(settings["activation_func"])
    for name, value in {**WITHOUT_CUDA, "pipeline_dtype": torch.float32, **settings}.items():
        setattr(provider, name, value)
    parallel_state.initialize_model_parallel(
        provider.tensor_model_parallel_size,
        provider.pipeline_model_parallel_size,
        expert_model_parallel_size=provider.expert_model_parallel_size,
        expert_tensor_parallel_size=provider.expert_tensor_parallel_size,
    )
    model_parallel_cuda_manual_seed(1)
    provider.finalize()
    return [chunk.eval() for chunk in build(provider)]


STRICTLY, AS_A_RUN = "strictly", "as a run"
"""How to load: as megatron-core loads what it saved, or as `mbtrain` loads `checkpoint.pretrained_checkpoint`."""


def logits_of(rank: int, model: tuple[dict, dict, str], iteration: str, tokens: list[list[int]], load: str = STRICTLY) -> Any:
    """Load a checkpoint and run it.

    `model` is a `config.json`, settings of `mbtrain`, and a folder of further family files.

    Answers (keys nobody asked for, logits [batch, sequence, padded vocabulary] as a numpy array on the last stage, else None).
    """
    from converter import families as registry
    from trainer import cpu_backend

    config, settings, families = model
    registry.__path__ = [*([families] if families else []), *registry.__path__]
    with cpu_backend.activate():  # for the streams of token dispatchers
        chunks = build(config, **settings)
        left = load_strictly(chunks, iteration) if load == STRICTLY else _start_from(chunks, iteration)
        return left, forward(chunks, tokens, runtime_gather_output=True)


def _start_from(chunks: list[Any], iteration: str) -> list[str]:
    from trainer.checkpoints import live

    loaded = live.load(chunks, iteration)
    assert loaded.tensors == loaded.of
    return []


def weights_of(chunk: Any) -> dict[str, Any]:
    """The parameters of a model, and the biases of its routers, which are buffers."""
    biases = {name: buffer for name, buffer in chunk.named_buffers() if name.endswith("expert_bias")}
    return {**dict(chunk.named_parameters()), **biases}


def differences(rank: int, config: dict, iteration: str, tokens: list[list[int]], changes: dict[str, dict]) -> dict[str, float]:
    """How far logits go from those of a checkpoint's model, as a share of the largest, with each of the changes to `mbtrain`'s
    provider; by their names. Weights that the changed model has otherwise are cut to its shapes, or stay as they are made."""
    from trainer import cpu_backend

    with cpu_backend.activate():  # for the streams of token dispatchers
        return _differences(config, iteration, tokens, changes)


def _differences(config: dict, iteration: str, tokens: list[list[int]], changes: dict[str, dict]) -> dict[str, float]:
    import numpy as np
    import torch
    from megatron.core import parallel_state

    chunks = build(config)
    load_strictly(chunks, iteration)
    outputs, weights = {"": forward(chunks, tokens, runtime_gather_output=True)}, weights_of(chunks[0])
    for name, settings in changes.items():
        parallel_state.destroy_model_parallel()
        changed = build(config, **settings)
        with torch.no_grad():
            for key, parameter in weights_of(changed[0]).items():
                if key in weights and weights[key].ndim == parameter.ndim:
                    both = tuple(map(slice, map(min, weights[key].shape, parameter.shape)))
                    parameter[both] = weights[key][both]
        outputs[name] = forward(changed, tokens, runtime_gather_output=True)
    plain = outputs.pop("")
    return {name: float(np.abs(logits - plain).max() / np.abs(plain).max()) for name, logits in outputs.items()}
