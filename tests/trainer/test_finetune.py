"""Fine-tuning from a converted model to one that answers: all parameters, and adapters that are merged or stay beside it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.trainer import witness
from tests.trainer.test_generation import answers, transformers_tokens

STEPS, END = 12, 2
"""END is what ends a text for the small models' tokenizer."""


@pytest.fixture(scope="module")
def examples(tmp_path_factory):
    """Sums as prompts and completions."""
    file = tmp_path_factory.mktemp("examples") / "sums.jsonl"
    pairs = [(first, second) for first in range(10) for second in range(10)]
    file.write_text("".join(json.dumps({"prompt": f"{a} and {b} are ", "completion": str(a + b)}) + "\n" for a, b in pairs))
    return file


def _told(examples, **changes):
    from trainer.config import FinetuningDatasetConfig

    dataset = FinetuningDatasetConfig(path=str(examples), sequence_length=64, split="80,20,0", num_workers=0)
    settings = {"train__train_iters": STEPS, "validation__eval_iters": 2, "validation__eval_interval": 6, "dataset": dataset}
    return {**settings, "validation__sample_interval": 6, "validation__sample_tokens": 4, **changes}


def _tokens(generated):
    """As transformers counts them: with the token that ends an answer."""
    return [[*answer["tokens"], *([END] if answer["finished"] else [])] for answer in generated]


def _lines(run: Path, kind: str):
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line for line in records if line["kind"] == kind]


def test_a_tuned_model_answers_in_transformers_as_it_does_here(ranks, model_folder, examples, tmp_path):
    from converter import hf_to_mcore, mcore_to_hf

    hf_to_mcore(str(model_folder("gqa")), str(tmp_path / "megatron"), tp=2)
    run = tmp_path / "run"
    changes = {"model__tensor_model_parallel_size": 2, "checkpoint__pretrained_checkpoint": str(tmp_path / "megatron")}
    ranks.run(witness.train, 2, str(model_folder("gqa")), _told(examples, **changes, checkpoint__save=str(run)))
    held_out = [line["loss"] for line in _lines(run, "evaluation") if line["split"] == "validation"]
    assert held_out[-1] < held_out[0]
    samples = _lines(run, "sample")
    assert [line["iteration"] for line in samples] == [6, 6, 12, 12]
    assert all(line["prompt"].endswith("a r e") for line in samples)  # as this small tokenizer writes them
    mcore_to_hf(str(run), str(tmp_path / "back"))
    (generated,) = ranks.run(answers, 1, str(run))
    assert _tokens(generated) == transformers_tokens(tmp_path / "back")
    assert _tokens(generated) != transformers_tokens(model_folder("gqa"))


@pytest.mark.parametrize("method", ["lora", "dora"])
def test_adapters_answer_beside_their_base_as_the_merged_model_does_in_transformers(
    method, ranks, model_folder, examples, tmp_path
):
    from converter import merge
    from trainer.peft import DoRA, LoRA

    run = tmp_path / "run"
    peft = {"lora": LoRA, "dora": DoRA}[method](dim=8, alpha=64)
    ranks.run(witness.train, 1, str(model_folder("gqa")), _told(examples, peft=peft, checkpoint__save=str(run)))
    merge(str(model_folder("gqa")), str(run), str(tmp_path / "merged"))
    expected = transformers_tokens(tmp_path / "merged")
    assert expected != transformers_tokens(model_folder("gqa"))
    for world, layout in ((1, ()), (2, ("model.tensor_model_parallel_size=2",))):
        assert _tokens(ranks.run(answers, world, str(run), layout)[-1]) == expected


def test_fine_tuning_that_names_no_model_is_refused(ranks, model_folder, examples):
    from formats.errors import UserError

    with pytest.raises(UserError, match="fine-tuning needs a model to start from"):
        ranks.run(witness.train, 1, str(model_folder("gqa")), _told(examples, checkpoint__pretrained_checkpoint=None))


def test_no_tokenizer_or_nothing_to_ask_is_told_before_the_first_step(ranks, model_folder, tmp_path):
    from formats.errors import UserError

    settings = {"validation__sample_interval": 5, "train__train_iters": 1, "scheduler__lr_warmup_iters": 0}
    with pytest.raises(UserError, match="and there are no prompts"):
        ranks.run(witness.train, 1, str(model_folder("gqa")), settings)


def test_examples_that_are_not_there_are_missed_before_the_model_is_loaded(ranks, model_folder, tmp_path):
    from formats.errors import UserError

    (tmp_path / "model").mkdir()  # loading it would be an error of its own
    for path, message in ((tmp_path / "none.jsonl", "none.jsonl` does not exist"), (None, "`dataset.path` is not set")):
        changes = _told(path, checkpoint__pretrained_checkpoint=str(tmp_path / "model"))
        changes["dataset"].path = str(path) if path else None
        with pytest.raises(UserError, match=message):
            ranks.run(witness.train, 1, str(model_folder("gqa")), changes)
