"""Tokens of examples on disk: made once, found again as long as nothing has changed, refused where they do not fit."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, replace

import numpy as np
import pytest
from click.testing import CliRunner

from formats.errors import UserError
from tests.trainer.chat import llama
from tests.trainer.chat.packed import Drawn
from trainer import tokenizers
from trainer.cli import main
from trainer.config import FinetuningDatasetConfig
from trainer.data import build
from trainer.data.chat import store

LENGTH = 96


@dataclass
class Example:
    tokens: np.ndarray
    trained: np.ndarray


def written(folder, *, vocab_size=384, count=200, drawn=None):
    drawn = drawn or Drawn(count)
    folder.mkdir()
    examples = (Example(*drawn[number]) for number in range(drawn.count))
    store.write(folder, examples, vocab_size=vocab_size, about=lambda: {"made_of": "numbers"})
    return drawn, store.open_store(folder)


@pytest.mark.parametrize(("vocab_size", "kind"), [(2**16, "uint16"), (2**16 + 1, "int32")])
def test_what_was_written_is_read(vocab_size, kind, tmp_path, monkeypatch):
    monkeypatch.setattr(store, "_BUFFER_TOKENS", 500)  # several times full
    drawn, stored = written(tmp_path / "store", vocab_size=vocab_size)
    assert (stored.about["dtype"], stored.about["made_of"], len(stored)) == (kind, "numbers", 200)
    assert stored.lengths.tolist() == drawn.lengths.tolist()
    for number in range(200):
        for actual, expected in zip(stored[number], drawn[number], strict=True):
            assert actual.tolist() == expected.tolist()
    everything = [drawn[number] for number in range(200)]
    assert stored.about["tokens"] == sum(len(tokens) for tokens, _ in everything)
    assert stored.about["trained"] == sum(int(trained.sum()) for _, trained in everything)
    assert stored.about["largest"] == max(int(tokens.max()) for tokens, _ in everything)


def test_a_token_beyond_the_vocabulary_is_refused(tmp_path):
    with pytest.raises(UserError) as caught:
        written(tmp_path / "store", vocab_size=20)
    assert str(caught.value).startswith("an example has the token id 47, but the vocabulary has 20")


def test_a_damaged_store_is_refused(tmp_path):
    _, stored = written(tmp_path / "store")
    tokens = tmp_path / "store" / "tokens.bin"
    tokens.write_bytes(tokens.read_bytes()[:-2])
    with pytest.raises(UserError, match=r"tokens.bin` has \d+ bytes, but `about.json` says"):
        store.open_store(tmp_path / "store")
    (tmp_path / "store" / "about.json").write_text(json.dumps({**stored.about, "version": 0}))
    with pytest.raises(UserError, match="written by another version"):
        store.open_store(tmp_path / "store")


@pytest.fixture
def data(tmp_path):
    """Forty prompts and completions."""
    path = tmp_path / "examples.jsonl"
    words = [{"prompt": f"Question {number}? ", "completion": "yes " * (1 + number % 9)} for number in range(40)]
    path.write_text("".join(json.dumps(pair) + "\n" for pair in words))
    return path


def config(path, **settings):
    return FinetuningDatasetConfig(sequence_length=LENGTH, path=str(path), split="80,20,0", **settings)


def made(settings, *, samples=(20, 4, 0), vocab_size=384, tokenizer="byte"):
    return build(settings, tokenizer=tokenizers.load(tokenizer), vocab_size=vocab_size, samples=samples)


def text(sample):
    return tokenizers.load("byte").decode(sample["tokens"].tolist())


def test_examples_are_tokenized_once_and_again_where_something_changed(data):
    train, valid, test = made(config(data))
    assert (len(train), len(valid), test) == (20, 4, None)
    folder = data.parent / "examples.jsonl.cache"
    (first,) = folder.iterdir()
    before = (first / "tokens.bin").stat().st_mtime_ns
    again, *_ = made(config(data))
    assert [path.name for path in folder.iterdir()] == [first.name]
    assert (first / "tokens.bin").stat().st_mtime_ns == before
    assert text(again[3]) == text(train[3])
    made(config(data, prompt_template="Q: {prompt}"))
    assert len(list(folder.iterdir())) == 2
    with data.open("a") as file:
        file.write(json.dumps({"prompt": "One more? ", "completion": "no"}) + "\n")
    made(config(data))
    assert len(list(folder.iterdir())) == 3


def test_what_was_found_is_told(data):
    train, *_ = made(config(data))
    (line,) = train.summary
    assert line.startswith("40 examples of 1 file: ")
    assert "% trained on, 0 truncated to 96, 0 skipped; " in line
    assert line.endswith(f"{100 * train.efficiency:.1f} % of packed rows filled")
    assert train.efficiency > 0.9


def test_splits_share_no_example(data):
    train, valid, _ = made(config(data), samples=(train_rows(data), 4, 0))

    def questions(rows):
        return {part.split("?")[0] for number in range(len(rows)) for part in text(rows[number]).split("Question ")[1:]}

    assert len(questions(train) | questions(valid)) == 40
    assert not questions(train) & questions(valid)


def test_the_answers_of_a_conversation_are_in_one_split(tmp_path):
    path, folder = tmp_path / "talks.jsonl", llama.save(tmp_path / "tokenizer")
    talks = [{"messages": llama.said(*(f"talk {number}." for _ in range(2 * (1 + number % 3))))} for number in range(60)]
    path.write_text("".join(json.dumps(talk) + "\n" for talk in talks))
    settings = FinetuningDatasetConfig(sequence_length=LENGTH, path=str(path), split="50,50,0", packed=False, learn="each_answer")
    tokenizer = tokenizers.load(str(folder))
    train, valid, _ = build(settings, tokenizer=tokenizer, vocab_size=384, samples=(300, 300, 0))
    numbers = []
    for split in (train, valid):
        rows = [split[number] for number in range(split.per_epoch)]
        numbers.append([re.findall(r"talk (\d+)\.", tokenizer.decode(row["tokens"].tolist()))[0] for row in rows])
    assert len(numbers[0]) + len(numbers[1]) == 120
    assert not set(numbers[0]) & set(numbers[1])
    assert len(set(numbers[0])) == len(set(numbers[1])) == 30
    assert [len(store.open_store(folder)) for folder in (tmp_path / "talks.jsonl.cache").iterdir()] == [120]


def train_rows(data):
    (train, *_) = made(config(data), samples=(1, 0, 0))
    return train._epoch_ends[0]


def test_validation_that_nobody_asked_for_may_be_missing(tmp_path):
    path = tmp_path / "few.jsonl"
    path.write_text(json.dumps({"prompt": "a", "completion": "b"}) + "\n")
    settings = FinetuningDatasetConfig(sequence_length=LENGTH, path=str(path))
    train, valid, _ = made(settings)
    assert valid is None
    assert train.summary[-1] == "note: `dataset.split=95,5,0` of 1 examples leaves none for validation"
    with pytest.raises(UserError, match="of 1 examples leaves none for validation"):
        made(replace(settings, split="90,10,0"))


def test_without_a_tokenizer_there_are_no_tokens(data):
    with pytest.raises(UserError, match="none is set"):
        build(config(data), tokenizer=None, vocab_size=384, samples=(1, 0, 0))


@pytest.fixture
def packed(data, tmp_path, model_folder):
    """The same examples, packed beforehand by the command."""
    out = tmp_path / "packed"
    overrides = [
        f"dataset.path={data}",
        f"dataset.sequence_length={LENGTH}",
        'dataset.split="80,20,0"',
        "tokenizer.tokenizer_model=byte",
    ]
    result = CliRunner().invoke(main, ["pack", "llama_tiny", str(out), *overrides, "--json"])
    assert result.exit_code == 0, result.output
    return out, json.loads(result.stdout)


def test_a_packed_folder_is_trained_from(packed, data):
    out, report = packed
    assert [part["split"] for part in report] == ["train", "validation"]
    assert [part["examples"] for part in report] == [32, 8]
    assert sorted(path.name for path in out.iterdir()) == ["train", "validation"]
    ours, theirs = (made(config(path), samples=(2 * report[0]["rows"], 4, 0)) for path in (out, data))
    rows = report[0]["rows"]

    def parts(train, first):
        return sorted(
            tuple(sample["tokens"][sample["segment_ids"] == number].tolist())
            for sample in (train[first + row] for row in range(rows))
            for number in range(int(sample["segment_ids"].max()) + 1)
        )

    assert len(parts(ours[0], 0)) == 32
    assert parts(ours[0], 0) == parts(ours[0], rows)  # both epochs have all examples, in another order
    assert [text(ours[0][row]) for row in range(rows)] != [text(ours[0][row + rows]) for row in range(rows)]
    known = {tuple(part.tolist()) for part, _ in (theirs[0].store[number] for number in range(40))}
    assert set(parts(ours[0], 0)) <= known
    assert ours[0].summary[0].startswith("40 examples of 1 file")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sequence_length": 64}, "`dataset.sequence_length` is `64`, but `{}` was packed with `96`"),
        ({"pad_to_multiple_of": 4}, "`dataset.pad_to_multiple_of` is `4`, but `{}` was packed with `1`"),
        ({"packed": False}, "`dataset.packed` is `False`, but `{}` has packed examples"),
    ],
)
def test_a_packed_folder_is_for_what_it_was_packed_with(changes, message, packed):
    with pytest.raises(UserError) as caught:
        made(replace(config(packed[0]), **changes))
    assert caught.value.args[0] == message.format(packed[0] / "train")


def test_a_packed_folder_brings_its_own_validation(packed, data):
    with pytest.raises(UserError) as caught:
        made(config(packed[0], validation_path=str(data)))
    assert caught.value.args[0] == (f"`dataset.validation_path` is `{data}`, but `{packed[0]}` has packed examples of all splits")


def test_a_packed_folder_of_another_tokenizer_is_refused(packed, model_folder):
    with pytest.raises(UserError, match="was packed with another tokenizer than this run's"):
        build(config(packed[0]), tokenizer=tokenizers.load(str(model_folder())), vocab_size=384, samples=(1, 0, 0))
    with pytest.raises(UserError, match="has the token id 256, but the vocabulary has 256"):
        made(config(packed[0]), vocab_size=256)


def test_what_another_put_there_meanwhile_stays(data, tmp_path, monkeypatch):
    out, overrides = tmp_path / "out", [f"dataset.path={data}", "tokenizer.tokenizer_model=byte"]

    def save(path, array, real=store.save_array):
        out.mkdir(exist_ok=True)
        (out / "precious").write_text("x")
        real(path, array)

    monkeypatch.setattr(store, "save_array", save)
    result = CliRunner().invoke(main, ["pack", "llama_tiny", str(out), *overrides])
    assert result.exit_code == 1
    assert f"error: `{out}` appeared while it was being written" in result.stderr
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith("out")] == ["out"]
    assert (out / "precious").read_text() == "x"


def test_packing_again_needs_another_folder(packed, data):
    overrides = [f"dataset.path={data}", "tokenizer.tokenizer_model=byte"]
    result = CliRunner().invoke(main, ["pack", "llama_tiny", str(packed[0]), *overrides])
    assert result.exit_code == 1
    assert f"error: `{packed[0]}` exists" in result.stderr
