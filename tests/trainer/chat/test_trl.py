"""TRL's SFTTrainer learns the same tokens of the same examples, and gives the same losses and gradient norms."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from tests.trainer import small
from tests.trainer.chat import family as families
from tests.trainer.chat.llama import said
from trainer import tokenizers
from trainer.config import FinetuningDatasetConfig
from trainer.data.chat.packed import pack

pytest.importorskip("trl", reason="the reference of these tests")
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")

EPOCHS, EXAMPLES, LENGTH = 6, 24, 64
CLOSE = 1e-4
"""fp32 sums in another order, carried through six updates."""

TEMPLATES = {
    "gemma": ("gemma2", "<end_of_turn>"),
    "llama3": ("llama3_1", "<|eot_id|>"),
    "qwen2_5": ("qwen2_5", "<|im_end|>"),
}
"""Templates that TRL keeps a marked version of; the family whose special tokens they have, and the token that ends an answer."""

CONVERSATIONS = [
    said("What is it?", "A fox."),
    said("What is it?", "A fox.", "And now?", "It sleeps."),
    said("What is it?", "  A fox,\n\nor two.  ", "And now?", "It sleeps.\n", "the weather", "rain"),
]


def sft_trainer(folder: Path, examples, model, out: Path, **settings):
    """TRL's trainer over these examples, with the tokenizer of `folder`."""
    from datasets import Dataset
    from transformers import AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    arguments = {
        "report_to": "none",
        "use_cpu": True,
        "save_strategy": "no",
        "disable_tqdm": True,
        "bf16": False,
        "max_length": LENGTH,
    }
    config = SFTConfig(str(out), **arguments | {"gradient_checkpointing": False, "logging_steps": 1, "seed": 1} | settings)
    renderer = AutoTokenizer.from_pretrained(folder)
    renderer.pad_token = renderer.pad_token or renderer.eos_token
    return SFTTrainer(model, args=config, train_dataset=Dataset.from_list(examples), processing_class=renderer)


def tiny_model():
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    return LlamaForCausalLM(LlamaConfig(vocab_size=1024, **sizes))


def of_trl(trainer):
    """Tokens, and which are learned, of each example."""
    rows = list(trainer.train_dataset)
    return [(row["input_ids"], [int(label != -100) for label in row["labels"]]) for row in rows]


def runs(tokens, learned):
    """The start and end of each run of learned tokens."""
    edges = np.flatnonzero(np.diff([0, *learned, 0])).tolist()
    return list(zip(edges[::2], edges[1::2], strict=True))


def with_template(folder: Path, template: str) -> Path:
    """The folder of a tokenizer, with this template of TRL's."""
    import trl

    text = (Path(trl.__file__).parent / "chat_templates" / f"{template}.jinja").read_text(encoding="utf-8")
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": text}))
    return folder


@pytest.mark.parametrize("name", sorted(TEMPLATES))
def test_what_trl_learns_beyond_this_is_white_space_around_an_answer(name, tmp_path, learn):
    family, end = TEMPLATES[name]
    folder = with_template(families.save(tmp_path / name, family, families.load(family)[0]), name)
    tokenizer = tokenizers.load(str(folder))
    examples = [{"messages": messages} for messages in CONVERSATIONS]
    theirs = of_trl(sft_trainer(folder, examples, tiny_model(), tmp_path, assistant_only_loss=True, max_length=None))
    for (tokens, trained), (expected, marked) in zip(learn(*examples, tokenizer=tokenizer), theirs, strict=True):
        assert tokens == expected
        for (begin, stop), (marked_begin, marked_stop) in zip(runs(tokens, trained), runs(expected, marked), strict=True):
            assert marked_begin <= begin
            assert stop <= marked_stop
            assert tokenizer.decode(tokens[marked_begin:begin]).strip() == ""
            assert tokenizer.decode(tokens[stop - 1 : stop]) == end
            assert tokenizer.decode(tokens[stop:marked_stop]).strip() == ""


def test_prompts_that_end_with_a_token_and_completions_are_learned_as_trl_does(tmp_path, learn, folder, tokenizer):
    pairs = [("what is it?", " a fox"), ("user\n\n", "the quick brown"), ("12345:", " it is\n\n\na fox!")]
    examples = [{"prompt": prompt, "completion": completion} for prompt, completion in pairs]
    theirs = of_trl(sft_trainer(folder, [dict(example) for example in examples], tiny_model(), tmp_path))
    assert learn(*examples) == theirs


@pytest.fixture(scope="module")
def sums(tmp_path_factory):
    """Sums as prompts and completions of several lengths."""
    file = tmp_path_factory.mktemp("examples") / "sums.jsonl"
    examples = [
        {"prompt": f"{n} and {n * n} are ", "completion": " ".join(str(n + n * n) * (1 + n % 5))} for n in range(EXAMPLES)
    ]
    file.write_text("".join(json.dumps(example) + "\n" for example in examples))
    return file, examples


@pytest.fixture(scope="module")
def reference(sums, folder, model_folder, tmp_path_factory):
    """Losses and gradient norms of TRL's trainer, all examples in each step."""
    from transformers import AutoModelForCausalLM

    out = tmp_path_factory.mktemp("trl")
    rates = {
        "learning_rate": 3e-3,
        "lr_scheduler_type": "constant",
        "weight_decay": 0.1,
        "adam_beta2": 0.95,
        "max_grad_norm": 1.0,
    }
    batches = {"per_device_train_batch_size": 3, "gradient_accumulation_steps": EXAMPLES // 3, "max_steps": EPOCHS}
    model = AutoModelForCausalLM.from_pretrained(model_folder("gqa"), dtype="float32")
    trainer = sft_trainer(folder, [dict(example) for example in sums[1]], model, out, **rates, **batches)
    trainer.train()
    steps = [line for line in trainer.state.log_history if "grad_norm" in line]
    return [line["loss"] for line in steps], [line["grad_norm"] for line in steps]


@pytest.mark.parametrize(("tp", "packed"), [(1, False), (1, True), (2, False), (2, True)])
def test_losses_and_gradient_norms_are_those_of_trl(tp, *, packed, ranks, sums, reference, folder, model_folder, tmp_path):
    options = {"sequence_length": LENGTH, "split": "100,0,0", "num_workers": 0, "packed": packed}
    config, rows = FinetuningDatasetConfig(path=str(sums[0]), **options), EXAMPLES
    if packed:
        tokenizer = tokenizers.load(str(folder))
        (done,) = pack(config, tmp_path / "packed", tokenizer=tokenizer, vocab_size=384, note=pytest.fail)
        config, rows = FinetuningDatasetConfig(path=str(tmp_path / "packed"), **options), done.rows
        assert rows < EXAMPLES
    changes = {"train__train_iters": EPOCHS, "train__global_batch_size": rows, "train__micro_batch_size": 1, "dataset": config}
    changes["tokenizer__tokenizer_model"] = str(folder)
    rates = {"scheduler__lr_decay_style": "constant", "scheduler__lr_warmup_iters": 0, "model__tensor_model_parallel_size": tp}
    losses, norms = reference
    for history in ranks.run(small.train, tp, str(model_folder("gqa")), changes | rates):
        assert history.rates == [3e-3] * EPOCHS
        assert history.losses == pytest.approx(losses, abs=CLOSE)
        assert history.grad_norms == pytest.approx(norms, rel=CLOSE, abs=CLOSE)
    assert losses[-1] < losses[0] - 0.05
