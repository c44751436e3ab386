r"""LoRA on megatron-core's GPTModel in a `for` loop: packed rows made beforehand and kept on the GPU, no files, no logging.

    python -m benchmarks.bare_finetune --shape 8b --sequence 4096 --micro-batch 2 --microbatches 2 \
        --steps 10 --warm-up 4 --rows DIR [--fp8]

The model is frozen and the adapters are `trainer.peft`'s own, so that what is left between this and `mbtrain finetune` is data,
logging and agreement over ranks; `--adapters plain` has them written as a reader of the paper would, to see what ours save.
Prints one JSON object.
"""

from __future__ import annotations

import argparse
import json
import statistics
from functools import partial
from itertools import cycle
from typing import Any

import torch
import torch.distributed as dist

from benchmarks import packed
from benchmarks.bare_loop import RECIPES, make_model, step_times
from trainer.peft import LoRA
from trainer.peft.adapter_layer import Adapter, adapt
from trainer.peft.attach import attach
from trainer.peft.linear import describe_linear


def main() -> None:
    """Time the steps and print the figures."""
    options = packed.arguments(__doc__, shapes=tuple(RECIPES), adapters=("ours", "plain"))
    torch.cuda.set_device(0)
    dist.init_process_group("nccl", init_method="tcp://127.0.0.1:0", rank=0, world_size=1)
    print(json.dumps(_time(options)))
    dist.destroy_process_group()


class PlainAdapter(Adapter):
    """Plain s·B·A·x, with s = 1."""

    def __init__(self, linear: Any) -> None:
        super().__init__()
        options = {"bias": False, "device": linear.device, "dtype": linear.dtype}
        self.a, self.b = (
            torch.nn.Linear(linear.columns, packed.RANK, **options),
            torch.nn.Linear(packed.RANK, linear.rows, **options),
        )
        torch.nn.init.zeros_(self.b.weight)

    def forward(self, output: torch.Tensor, layer_input: torch.Tensor) -> torch.Tensor:
        """Return the new output."""
        return output + self.b(self.a(layer_input))


class Plain(LoRA):
    """A plain adapter in each layer."""

    def transform(self, module: torch.nn.Module, name: str) -> torch.nn.Module:
        """Return a plain adapter for the whole layer."""
        return adapt(module, PlainAdapter(describe_linear(module, name)))


def _time(options: argparse.Namespace) -> dict[str, Any]:
    config, model = make_model(options, layers=options.layers)
    config.calculate_per_token_loss = True
    attached = attach([model], Plain() if options.adapters == "plain" else LoRA(dim=packed.RANK, alpha=packed.RANK))
    count = options.steps * options.microbatches
    batches = packed.microbatches(
        options.rows, vocab_size=config.vocab_size, sequence=options.sequence, micro_batch=options.micro_batch, count=count
    )
    seconds = _median_step(options, config, model, batches)
    rate = options.microbatches * options.micro_batch * options.sequence / seconds
    work = packed.flops(config, batches) / (count * options.micro_batch * options.sequence)
    return {
        "tokens_per_second": rate,
        "tflops": rate * work / 1e12,
        "memory_gib": torch.cuda.max_memory_allocated() / 2**30,
        "trained": attached.trained,
    }


def _median_step(options: argparse.Namespace, config: Any, model: Any, batches: list[dict[str, Any]]) -> float:
    """Return the median seconds per step."""
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
    from megatron.core.distributed.finalize_model_grads import finalize_model_grads
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
    from megatron.core.pipeline_parallel import get_forward_backward_func

    buffers = DistributedDataParallelConfig(grad_reduce_in_fp32=True, use_distributed_optimizer=True)
    ddp = DistributedDataParallel(config, buffers, model)
    settings = OptimizerConfig(
        optimizer="adam", lr=1e-4, bf16=True, params_dtype=torch.bfloat16, use_distributed_optimizer=True, clip_grad=1.0
    )
    optimizer = get_megatron_optimizer(settings, [ddp])
    config.finalize_model_grads_func, config.grad_scale_func = finalize_model_grads, optimizer.scale_loss
    step = partial(
        get_forward_backward_func(),
        forward_step_func=_forward,
        data_iterator=cycle(_on_gpu(batches)),
        model=[ddp],
        num_microbatches=options.microbatches,
        seq_length=options.micro_batch * options.sequence,
        micro_batch_size=1,
        forward_only=False,
    )
    return statistics.median(step_times(options.steps, ddp, optimizer, step)[options.warm_up :])


def _on_gpu(batches: list[dict[str, Any]]) -> list[Any]:
    """Concatenate the rows and make the attention arguments before the clock starts."""
    from trainer import segments
    from trainer.loss import end_to_end, packed_seq_params

    inputs = [end_to_end(batch, segments.find_segments(batch["segment_ids"])) for batch in batches]
    return [(each.tensors, packed_seq_params(each)) for each in inputs]


def _forward(batches: Any, model: Any) -> Any:
    from trainer.loss import masked_sum

    batch, packed = next(batches)
    losses = model(batch["tokens"], batch["position_ids"], None, labels=batch["labels"], packed_seq_params=packed)
    return losses, partial(masked_sum, mask=batch["loss_mask"])


if __name__ == "__main__":
    main()
