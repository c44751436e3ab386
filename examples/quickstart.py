"""Quickstart: load a Hugging Face model, train it, and export it as a Hugging Face model.

    python examples/quickstart.py                                  # a tiny random Llama
    python examples/quickstart.py --save /tmp/quickstart           # keep the Megatron checkpoint and its export
    python examples/quickstart.py --model meta-llama/Llama-3.2-1B  # a directory or a Hub id; this one needs a GPU
    torchrun --nproc-per-node 2 examples/quickstart.py --tp 2      # tensor parallelism over two processes

The data is mock data. For your own, see `mbtrain prepare-data --help` and set `config.dataset.blend`.
"""

from __future__ import annotations

import argparse
import os
import tempfile

from trainer import AutoBridge, forward_step, pretrain
from trainer.recipes import llama32_1b


def main() -> None:
    """Train for ten steps."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--model")
    parser.add_argument("--save")
    parser.add_argument("--tp", type=int, default=1)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        train(arguments.model or tiny_llama(folder), save=arguments.save, tp=arguments.tp)


def train(model: str, *, save: str | None, tp: int) -> None:
    """Train for ten steps from the model's weights, then export to Hugging Face's format."""
    bridge = AutoBridge.from_hf_pretrained(model)
    provider = bridge.to_megatron_provider()
    provider.tensor_model_parallel_size = tp

    config = llama32_1b.pretrain_config()
    config.model = provider
    config.train.train_iters = 10
    config.train.global_batch_size = 8
    config.dataset.sequence_length = 64
    config.dataset.num_workers = 0
    config.validation.eval_iters = 1
    config.logger.log_interval = 1
    config.checkpoint.save = save
    pretrain(config, forward_step)

    if save and os.environ.get("RANK", "0") == "0":
        AutoBridge.export_ckpt(save, f"{save}-huggingface")


def tiny_llama(folder: str) -> str:
    """Save a random Llama of about 100,000 parameters to `folder`. The seed makes it the same in all processes."""
    import torch  # noqa: PLC0415 - not needed with `--model`
    from transformers import LlamaConfig, LlamaForCausalLM  # noqa: PLC0415

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=512,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


if __name__ == "__main__":
    main()
