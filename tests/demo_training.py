"""The second half of `make demo`: a small Llama is converted, trained on the standard library's sources in two processes,
converted back, and transformers finds the loss that the trainer found.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import sysconfig
import warnings
from pathlib import Path

import trainer.warnings_filter  # noqa: F401 - silences what megatron-core says on import
from tests.demo import FOLDER

warnings.filterwarnings("ignore", "Could not determine rank")

SOURCE, MEGATRON, TEXT, RUN, BACK = (
    FOLDER / name for name in ("small-hf", "small-megatron", "stdlib", "small-run", "small-back")
)
STEPS, CHECKS, BATCH = 60, 4, 8
NEAR = 1e-4
"""fp32 sums in another order."""


def main() -> None:
    """Run the commands a user would run, and compare losses."""
    for path in (SOURCE, MEGATRON, RUN, BACK):
        shutil.rmtree(path, ignore_errors=True)
    _make_model()
    library = Path(sysconfig.get_paths()["stdlib"])
    texts = [library / name for name in ("asyncio", "email", "http", "importlib", "json", "logging", "unittest")]
    run("trainer", "prepare-data", *texts, TEXT, "--tokenizer", SOURCE, "--overwrite", "--quiet")
    run("converter", "hf-to-mcore", SOURCE, MEGATRON, "--tp", 2, "--quiet")
    run(
        "trainer", "pretrain", "llama_tiny", "--nproc", 2, "model.tensor_model_parallel_size=2",
        f"checkpoint.pretrained_checkpoint={MEGATRON}", f"checkpoint.save={RUN}", f"dataset.blend=[{TEXT}]",
        "dataset.split='90,10,0'", "dataset.num_workers=0", f"tokenizer.tokenizer_model={SOURCE}", f"train.train_iters={STEPS}",
        f"train.global_batch_size={BATCH}", f"validation.eval_iters={CHECKS}", "validation.eval_interval=20",
    )  # fmt: skip
    run("converter", "mcore-to-hf", RUN, BACK, "--quiet")
    _compare()


def _make_model() -> None:
    """Random weights in the shape of the recipe, as transformers saves them, with a tokenizer of bytes."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from trainer.recipes import llama_tiny
    from trainer.tokenizers import load

    torch.manual_seed(0)
    config = llama_tiny.pretrain_config().model.hf_config
    load("byte").save(SOURCE)
    LlamaForCausalLM(LlamaConfig(**config)).save_pretrained(SOURCE)


def run(program: str, *arguments: object) -> None:
    """Show a command, and run it."""
    words = [str(argument) for argument in arguments]
    name = {"trainer": "mbtrain", "converter": "mbconvert"}[program]
    print(f"\n$ {name} {' '.join(words)}", flush=True)
    subprocess.run([sys.executable, "-m", program, *words], check=True)


def _compare() -> None:
    """The same held-out samples through transformers; stop with an error where the losses differ."""
    records = [json.loads(line) for line in (RUN / "metrics.jsonl").read_text().splitlines()]
    trained = [record["loss"] for record in records if record.get("split") == "validation"][-1]
    before, after = _loss_of_transformers(SOURCE), _loss_of_transformers(BACK)
    print(f"\nvalidation loss in transformers: {before:.6f} before, {after:.6f} after; the trainer's last one: {trained:.6f}")
    if abs(after - trained) > NEAR or after >= before:
        sys.exit("error: they should be the same, and lower than at the start")
    print(f"{BACK} is the model that was trained: transformers' loss is the trainer's, and lower than at the start")


def _loss_of_transformers(folder: Path) -> float:
    """Per token, over the samples that the trainer held out."""
    import torch
    from transformers import AutoModelForCausalLM

    from trainer import data
    from trainer.config import DatasetConfig
    from trainer.recipes import llama_tiny
    from trainer.tokenizers import load

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    length = llama_tiny.pretrain_config().dataset.sequence_length
    dataset = DatasetConfig(sequence_length=length, blend=[str(TEXT)], split="90,10,0")
    samples = (STEPS * BATCH, CHECKS * BATCH, 0)
    _, held_out, _ = data.build(dataset, tokenizer=load(str(SOURCE)), vocab_size=model.config.vocab_size, samples=samples)
    total = 0.0
    with torch.no_grad():
        for number in range(CHECKS * BATCH):
            sample = held_out[number]
            logits = model(sample["tokens"].unsqueeze(0)).logits[0]
            total += torch.nn.functional.cross_entropy(logits, sample["labels"]).item()
    return total / (CHECKS * BATCH)


if __name__ == "__main__":
    main()
