"""A training loop of megatron-core and nothing else: no data files, no logging, no checkpoints. The limit for `mbtrain`.

    torchrun --nproc-per-node N -m benchmarks.bare_loop --shape 1b --sequence 4096 --micro-batch 4 --microbatches 4 [--fp8]

Prints one JSON object. FLOPs are `trainer.estimate.flops`' own, so both programs count alike.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.distributed as dist

RECIPES = {"1b": "llama32_1b", "3b": "llama32_3b", "8b": "llama3_8b"}
WARM_UP = 5


def main() -> None:
    """Time the steps and print the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", choices=RECIPES, required=True)
    for name in ("sequence", "micro-batch", "microbatches"):
        parser.add_argument(f"--{name}", type=int, required=True)
    parser.add_argument("--steps", type=int, default=15)
    parser.add_argument("--fp8", action="store_true", help="current scaling in every layer, as the recipe of that name")
    options = parser.parse_args()
    torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    dist.init_process_group("nccl")
    figures = _time(options)
    if dist.get_rank() == 0:
        print(json.dumps(figures))
    dist.destroy_process_group()


def make_model(options: argparse.Namespace, *, layers: int | None = None) -> tuple[Any, Any]:
    """Return a recipe's config and its GPTModel on Transformer Engine, with `layers` layers if given."""
    from megatron.core import parallel_state
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_with_transformer_engine_spec
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    from trainer.recipes import find
    from trainer.settings import kernels
    from trainer.settings.precision import find_machine

    parallel_state.initialize_model_parallel()
    model_parallel_cuda_manual_seed(1)
    config = find(RECIPES[options.shape]).pretrain_config().model
    config.bf16, config.params_dtype, config.pipeline_dtype = True, torch.bfloat16, torch.bfloat16
    config.tensor_model_parallel_size = config.pipeline_model_parallel_size = config.context_parallel_size = 1
    config.sequence_parallel = False
    config.num_layers = layers or config.num_layers
    for name, value in kernels.fused(find_machine("gpu").transformer_engine).items():
        setattr(config, name, value)
    if options.fp8:
        config.fp8, config.fp8_recipe = "hybrid", "tensorwise"
    config.finalize()
    model = GPTModel(
        config,
        get_gpt_layer_with_transformer_engine_spec(),
        vocab_size=config.padded_vocab_size,
        max_sequence_length=options.sequence,
        position_embedding_type="rope",
        share_embeddings_and_output_weights=config.share_embeddings_and_output_weights,
        rotary_base=config.rotary_base,
    )
    return config, model.cuda().bfloat16()


def _wrapped(config: Any, model: Any) -> tuple[Any, Any]:
    """Return the model with megatron-core's gradient buffers, and its optimizer."""
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
    from megatron.core.distributed.finalize_model_grads import finalize_model_grads
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer

    ranks = dist.get_world_size()
    ddp = DistributedDataParallel(
        config,
        DistributedDataParallelConfig(
            grad_reduce_in_fp32=True,
            use_distributed_optimizer=True,
            overlap_grad_reduce=ranks > 1,
            overlap_param_gather=ranks > 1,
        ),
        model,
    )
    optimizer = get_megatron_optimizer(
        OptimizerConfig(
            optimizer="adam",
            lr=1e-4,
            bf16=True,
            params_dtype=torch.bfloat16,
            use_distributed_optimizer=True,
            clip_grad=1.0,
            overlap_param_gather=ranks > 1,
        ),
        [ddp],
    )
    config.finalize_model_grads_func, config.grad_scale_func = finalize_model_grads, optimizer.scale_loss
    return ddp, optimizer


def _time(options: argparse.Namespace) -> dict[str, Any]:
    """Return what training steps reach, by the names of `mbtrain`'s records."""
    from megatron.core.pipeline_parallel import get_forward_backward_func

    from trainer.estimate.flops import flops_per_token

    config, model = make_model(options)
    ddp, optimizer = _wrapped(config, model)
    step = partial(
        get_forward_backward_func(),
        forward_step_func=_forward,
        data_iterator=_random_tokens(options, config.vocab_size),
        model=[ddp],
        num_microbatches=options.microbatches,
        seq_length=options.sequence,
        micro_batch_size=options.micro_batch,
        forward_only=False,
    )
    times = step_times(options.steps, ddp, optimizer, step)
    seconds = statistics.median(times[WARM_UP:])
    rate = options.micro_batch * options.microbatches * options.sequence / seconds
    return {
        "tokens_per_second_per_gpu": rate,
        "tflops_per_gpu": rate * flops_per_token(config, options.sequence) / 1e12,
        "memory_gib": torch.cuda.max_memory_allocated() / 2**30,
    }


def step_times(steps: int, ddp: Any, optimizer: Any, forward_and_backward: Callable[[], Any]) -> list[float]:
    """Run training steps on a GPU, and return the seconds that each took."""
    times: list[float] = []
    for _ in range(steps):
        torch.cuda.synchronize()
        began = time.perf_counter()
        ddp.zero_grad_buffer()
        optimizer.zero_grad()
        forward_and_backward()
        optimizer.step()
        torch.cuda.synchronize()
        times.append(time.perf_counter() - began)
    return times


def _random_tokens(options: argparse.Namespace, vocab: int) -> Any:
    generator = torch.Generator().manual_seed(dist.get_rank())
    positions = torch.arange(options.sequence, device="cuda").expand(options.micro_batch, -1)
    while True:
        tokens = torch.randint(0, vocab, (options.micro_batch, options.sequence + 1), generator=generator).cuda()
        yield tokens[:, :-1].contiguous(), positions, tokens[:, 1:].contiguous()


def _forward(batches: Any, model: Any) -> Any:
    tokens, positions, labels = next(batches)
    losses = model(tokens, positions, None, labels=labels)
    return losses, lambda output: (output.mean(), {"loss": output.mean().detach()})


if __name__ == "__main__":
    main()
