"""A mixture of experts on megatron-core's GPTModel in a `for` loop: no data files, no logging, no checkpoints.

    python -m benchmarks.bare_experts --shape qwen3-30b --layers 4 --precision bf16 [--steps 12] [--warm-up 5]

`torchrun --nproc-per-node N` spreads the experts over N GPUs, each with batches of its own. Fused kernels and precision are those
that `mbtrain` chooses, but for `gradient_accumulation_fusion`, for which megatron-core needs APEX. Prints one JSON object. With
`--trace FILE`, two more steps follow under torch's profiler.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
from functools import partial
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.bare_loop import step_times
from benchmarks.expert_shapes import PRECISIONS, SHAPES, Shape, config_of, settings

TRACED = 2
"""Steps under the profiler."""


def main() -> None:
    """Time the steps and print the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, required=True)
    parser.add_argument("--layers", type=int, required=True)
    parser.add_argument("--precision", choices=PRECISIONS, required=True)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--warm-up", type=int, default=5)
    parser.add_argument("--trace", help="a file for a trace of two more steps")
    options = parser.parse_args()
    torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    single_process = {} if "RANK" in os.environ else {"init_method": "tcp://127.0.0.1:0", "rank": 0, "world_size": 1}
    dist.init_process_group("nccl", **single_process)
    figures = _time(options, SHAPES[options.shape])
    if dist.get_rank() == 0:
        print(json.dumps(figures))
    dist.destroy_process_group()


def resolved(config: dict[str, Any], chosen: dict[str, Any], machine: Any = None, *, world_size: int = 1) -> Any:
    """Return the run that `mbtrain` makes of a model's `config.json` and settings, on this machine or another."""
    from trainer.config import RunConfig
    from trainer.model import from_hf_config
    from trainer.settings.resolve import resolve

    run = RunConfig(model=from_hf_config(config))
    for name, value in chosen.items():
        section, _, setting = name.partition(".")
        setattr(getattr(run, section) if setting else run, setting or section, value)
    return resolve(run, world_size=world_size, device="gpu", machine=machine).config


def _model(provider: Any, sequence: int) -> Any:
    """Return megatron-core's own model of the provider's fields."""
    from megatron.core import parallel_state
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    parallel_state.initialize_model_parallel(expert_model_parallel_size=provider.expert_model_parallel_size)
    model_parallel_cuda_manual_seed(1)
    model = GPTModel(
        provider,
        get_gpt_decoder_block_spec(provider, use_transformer_engine=True, normalization=provider.normalization),
        vocab_size=provider.padded_vocab_size,
        max_sequence_length=sequence,
        position_embedding_type=provider.position_embedding_type,
        share_embeddings_and_output_weights=provider.share_embeddings_and_output_weights,
        rotary_base=provider.rotary_base,
    )
    return model.cuda().bfloat16()


def sections() -> tuple[Any, Any]:
    """Return the settings of gradient buffers and of the optimizer."""
    from megatron.core.distributed import DistributedDataParallelConfig
    from megatron.core.optimizer import OptimizerConfig

    sharded = {"use_distributed_optimizer": True}
    return DistributedDataParallelConfig(grad_reduce_in_fp32=True, **sharded), OptimizerConfig(
        optimizer="adam", lr=1e-4, bf16=True, params_dtype=torch.bfloat16, clip_grad=1.0, **sharded
    )


def _wrapped(run: Any, model: Any) -> tuple[Any, Any]:
    """Return the model with megatron-core's gradient buffers, and its optimizer."""
    from megatron.core.distributed import DistributedDataParallel
    from megatron.core.distributed.finalize_model_grads import finalize_model_grads
    from megatron.core.optimizer import get_megatron_optimizer

    buffers, chosen = sections()
    ddp = DistributedDataParallel(run.model, buffers, model)
    optimizer = get_megatron_optimizer(chosen, [ddp])
    run.model.finalize_model_grads_func, run.model.grad_scale_func = finalize_model_grads, optimizer.scale_loss
    return ddp, optimizer


def _time(options: argparse.Namespace, shape: Shape) -> dict[str, Any]:
    from megatron.core.pipeline_parallel import get_forward_backward_func

    gpus = dist.get_world_size()
    chosen = {**settings(shape, options.precision, gpus), "model.gradient_accumulation_fusion": False}
    run = resolved(config_of(shape, options.layers), chosen, world_size=gpus)
    ddp, optimizer = _wrapped(run, _model(run.model, shape.sequence))
    step = partial(
        get_forward_backward_func(),
        forward_step_func=_forward,
        data_iterator=_random_tokens(shape, run.model.vocab_size),
        model=[ddp],
        num_microbatches=shape.microbatches,
        seq_length=shape.sequence,
        micro_batch_size=shape.micro_batch,
        forward_only=False,
    )
    times = step_times(options.steps, ddp, optimizer, step)
    memory = torch.cuda.max_memory_allocated() / 2**30
    if options.trace:
        with torch.profiler.profile() as profiler:
            step_times(TRACED, ddp, optimizer, step)
        if dist.get_rank() == 0:
            profiler.export_chrome_trace(options.trace)
    return {"seconds_per_step": statistics.median(times[options.warm_up :]), "memory_gib": memory}


def _random_tokens(shape: Shape, vocab: int) -> Any:
    generator = torch.Generator().manual_seed(0)
    positions = torch.arange(shape.sequence, device="cuda").expand(shape.micro_batch, -1)
    while True:
        tokens = torch.randint(0, vocab, (shape.micro_batch, shape.sequence + 1), generator=generator).cuda()
        yield tokens[:, :-1].contiguous(), positions, tokens[:, 1:].contiguous()


def _forward(batches: Any, model: Any) -> Any:
    tokens, positions, labels = next(batches)
    losses = model(tokens, positions, None, labels=labels)
    return losses, lambda output: (output.mean(), {"loss": output.mean().detach()})


if __name__ == "__main__":
    main()
