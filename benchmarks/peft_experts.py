r"""LoRA on a mixture of experts with transformers and PEFT in a `for` loop: the same rows, kept on the device.

    python -m benchmarks.peft_experts --layers 16 --targets all --rows DIR

transformers computes all experts at once (`experts_implementation="grouped_mm"`), and PEFT has adapters on their stacked weights
(`target_parameters`). What would make it slower is left out as in `benchmarks.peft_finetune`. Prints one JSON object.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch

from benchmarks import packed
from benchmarks.expert_shapes import LORA, ROWS, config_of
from benchmarks.peft_finetune import as_transformers, median_step

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]


def main() -> None:
    """Time the steps and print the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, required=True)
    parser.add_argument("--targets", choices=("all", "attention"), required=True)
    parser.add_argument("--rows", type=Path, required=True, help="a folder of packed examples")
    parser.add_argument("--rank", type=int, required=True)
    parser.add_argument("--micro-batch", type=int, default=1)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--warm-up", type=int, default=4)
    options = parser.parse_args()
    config, microbatches = config_of(LORA, options.layers), ROWS // options.micro_batch
    rows = packed.microbatches(
        options.rows,
        vocab_size=config["vocab_size"],
        sequence=LORA.sequence,
        micro_batch=options.micro_batch,
        count=options.steps * microbatches,
    )
    model = _model(config, options)
    batches = [as_transformers(row, torch.device("cuda")) for row in rows]
    seconds = median_step(model, batches, steps=options.steps, warm_up=options.warm_up, microbatches=microbatches)
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    print(json.dumps({"seconds_per_step": seconds, "memory_gib": torch.cuda.max_memory_allocated() / 2**30, "trained": trained}))


def _model(config: dict[str, Any], options: argparse.Namespace) -> Any:
    """Return a model with random weights and adapters in bf16, created on the GPU."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoConfig, AutoModelForCausalLM

    model_config = AutoConfig.for_model(**config, use_cache=False)
    with torch.device("cuda"):
        model = AutoModelForCausalLM.from_config(
            model_config, dtype=torch.bfloat16, attn_implementation="sdpa", experts_implementation="grouped_mm"
        )
    lora = LoraConfig(
        r=options.rank,
        lora_alpha=options.rank,
        lora_dropout=0.0,
        target_modules=ATTENTION,
        target_parameters=EXPERTS if options.targets == "all" else None,
        task_type="CAUSAL_LM",
    )
    return get_peft_model(model, lora, autocast_adapter_dtype=False).cuda().train()


if __name__ == "__main__":
    main()
