"""Quickstart: take a Hugging Face model, train it, and have it back as a Hugging Face model.

    python examples/quickstart.py                                  # a tiny Llama, made on the spot
    python examples/quickstart.py --save /tmp/quickstart           # keep it: a Megatron checkpoint, and its export
    python examples/quickstart.py --model meta-llama/Llama-3.2-1B  # a directory or a Hub id; this one wants a GPU
    torchrun --nproc-per-node 2 examples/quickstart.py --tp 2      # in two processes, each with half of every layer

The data is made up. For your own, see `mbtrain prepare-data --help` and set `config.dataset.blend`.
"""

from __future__ import annotations

import argparse
import os
import tempfile

from trainer import AutoBridge, forward_step, pretrain
from trainer.recipes import llama32_1b


def main() -> None:
    """Ten steps."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--model")
    parser.add_argument("--save")
    parser.add_argument("--tp", type=int, default=1)
    told = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        train(told.model or tiny_llama(folder), save=told.save, tp=told.tp)


def train(model: str, *, save: str | None, tp: int) -> None:
    """From the model's weights, ten steps; then back to Hugging Face's format."""
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
    """A Llama of a hundred thousand parameters, as `save_pretrained` leaves it. The seed makes it the same in all processes."""
    import torch  # noqa: PLC0415 - a model that is there needs neither of them
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
