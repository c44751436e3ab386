r"""LoRA with transformers and PEFT in a `for` loop: the same rows, kept on the device.

    python -m benchmarks.peft_finetune --shape 8b --sequence 4096 --micro-batch 2 --microbatches 2 \
        --steps 10 --warm-up 4 --rows DIR

With `--adapters bf16` what would make it slower is left out: PEFT's default is fp32, with casts at every layer. AdamW is torch's
fused one, nothing is recomputed, and attention is plain causal over a whole row, since it is fastest without a mask: examples in
a row attend to each other, unlike in `mbtrain`. Model FLOPs are counted as if they did not. Prints one JSON object.
"""

from __future__ import annotations

import json
import statistics
import time
from itertools import cycle
from typing import Any

import torch

from benchmarks import packed
from benchmarks.bare_loop import RECIPES

LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
SHAPES = RECIPES | {"tiny": "llama_tiny"}


def main() -> None:
    """Time the steps and print the figures."""
    options = packed.arguments(__doc__, shapes=tuple(SHAPES), adapters=("bf16", "fp32"))
    provider = packed.provider(SHAPES[options.shape], options.layers)
    kind = torch.device("cuda" if options.device == "gpu" else "cpu")
    model = _model(provider, kind, as_by_default=options.adapters == "fp32")
    count = options.steps * options.microbatches
    rows = packed.microbatches(
        options.rows, vocab_size=provider.vocab_size, sequence=options.sequence, micro_batch=options.micro_batch, count=count
    )
    batches = [as_transformers(row, kind) for row in rows]
    seconds = median_step(model, batches, steps=options.steps, warm_up=options.warm_up, microbatches=options.microbatches)
    rate = options.microbatches * options.micro_batch * options.sequence / seconds
    trained = sum(param.numel() for param in model.parameters() if param.requires_grad)
    work = packed.flops(provider, rows) / (count * options.micro_batch * options.sequence)
    print(json.dumps(_figures(rate, work, kind, trained=trained)))


def _figures(rate: float, work: float, kind: torch.device, *, trained: int) -> dict[str, Any]:
    from trainer.logging.metrics import memory_gib

    return {"tokens_per_second": rate, "tflops": rate * work / 1e12, "memory_gib": memory_gib(kind), "trained": trained}


def _model(provider: Any, kind: torch.device, *, as_by_default: bool) -> Any:
    """Return a model with random weights, created on its device."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoConfig, AutoModelForCausalLM

    settings = dict(provider.hf_config) | {"num_hidden_layers": provider.num_layers, "use_cache": False}
    config = AutoConfig.for_model(**settings)
    with kind:
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, attn_implementation="sdpa")
    lora = LoraConfig(r=packed.RANK, lora_alpha=packed.RANK, lora_dropout=0.0, target_modules=LINEARS, task_type="CAUSAL_LM")
    return get_peft_model(model, lora, autocast_adapter_dtype=as_by_default).to(kind).train()


def as_transformers(batch: dict[str, Any], kind: torch.device) -> dict[str, torch.Tensor]:
    """Return a batch for transformers, whose labels are at their own token, not at the one before."""
    learned = torch.where(batch["loss_mask"] > 0, batch["labels"], -100)
    labels = torch.cat((torch.full_like(learned[:, :1], -100), learned[:, :-1]), dim=1)
    return {"input_ids": batch["tokens"].to(kind), "labels": labels.to(kind)}


def median_step(model: Any, batches: list[dict[str, torch.Tensor]], *, steps: int, warm_up: int, microbatches: int) -> float:
    """Return the median seconds of steps after the first `warm_up`, over batches that are repeated."""
    trained = [param for param in model.parameters() if param.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=True)
    wait = torch.cuda.synchronize if trained[0].is_cuda else lambda: None
    endless, times = cycle(batches), []
    for _ in range(steps):
        wait()
        began = time.perf_counter()
        optimizer.zero_grad(set_to_none=True)
        for _ in range(microbatches):
            (model(**next(endless)).loss / microbatches).backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        wait()
        times.append(time.perf_counter() - began)
    return statistics.median(times[warm_up:])


if __name__ == "__main__":
    main()
