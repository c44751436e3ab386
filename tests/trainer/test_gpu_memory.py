"""What a run takes of a GPU beside what the estimate says, for all parameters and for adapters. Left out by `make test`."""

from __future__ import annotations

import gc
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from tests.trainer import small
from tests.trainer.chat import packed

pytestmark = pytest.mark.gpu

LAYERS, SEQUENCE = 8, 4096
"""Of Llama 3 8B: enough that what is not counted does not matter, and room for an optimizer on one GPU of 80 GB."""

FP8 = "bf16_with_fp8_current_scaling_mixed"
GIB = 2**30


@dataclass
class Peak(small.History):
    """The most that was allocated, as a callback of the loop."""

    taken: int = 0

    def on_end(self, run: Any) -> None:
        self.taken = torch.cuda.max_memory_allocated()


def _config(method: str | None, precision: str, *, in_rows: bool, model: dict[str, Any]) -> Any:
    from trainer.config import RunConfig
    from trainer.model import from_hf_config
    from trainer.peft import DoRA, LoRA

    rows = packed.Given(sequence_length=SEQUENCE, longest=SEQUENCE // packed.EACH, count=64)
    dataset = rows if in_rows else small.FixedTokens(model["vocab_size"], sequence_length=SEQUENCE)
    config = RunConfig(model=from_hf_config(model), dataset=dataset, mixed_precision=precision)
    config.peft = {None: None, "lora": LoRA(dim=32), "dora": DoRA(dim=32)}[method]
    config.train.train_iters, config.train.global_batch_size, config.train.micro_batch_size = 3, 2, 1
    config.validation.eval_iters = 0
    config.checkpoint.random_weights = True
    config.optimizer.lr = 1e-5
    config.optimizer.use_distributed_optimizer = config.ddp.use_distributed_optimizer = True
    return config


def _taken(method: str | None, precision: str, in_rows: bool, model: dict[str, Any]) -> tuple[int, dict[str, tuple[int, str]]]:
    """Bytes that a run took at most, and the parts of the estimate."""
    from trainer import device
    from trainer.estimate.memory import memory
    from trainer.loop import pretrain
    from trainer.settings.resolve import resolve

    config = _config(method, precision, in_rows=in_rows, model=model)
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    seen = Peak()
    pretrain(config, callbacks=[seen])
    resolved = resolve(config, world_size=1, device=device.choose(config.dist.device)).config
    return seen.taken, {part.name: (part.size, part.why) for part in memory(resolved, world_size=1).parts}


@pytest.mark.parametrize(
    ("method", "precision", "in_rows"),
    [
        (None, "bf16_mixed", False),
        (None, FP8, False),
        ("lora", "bf16_mixed", False),
        ("lora", "bf16_mixed", True),
        ("lora", FP8, False),
        ("dora", "bf16_mixed", False),
        ("dora", FP8, False),
    ],
)
def test_a_run_takes_what_the_estimate_says(method, precision, in_rows, ranks):
    from trainer.recipes.llama3 import MODEL_8B

    ((taken, parts),) = ranks.run(_taken, 1, method, precision, in_rows, MODEL_8B | {"num_hidden_layers": LAYERS})
    estimated = sum(size for size, _ in parts.values())
    print(f"{method or 'all parameters'}, {precision}, {'packed' if in_rows else 'whole rows'}: "
          f"{taken / GIB:.2f} GiB, estimated {estimated / GIB:.2f} GiB ({estimated / taken - 1:+.1%})")  # fmt: skip
    for name, (size, why) in parts.items():
        print(f"  {name}: {size / GIB:.2f} GiB, {why}")
    assert estimated == pytest.approx(taken, rel=0.01)
