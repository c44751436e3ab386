"""Several sources: mixed by weight for training, and evaluated each by itself."""

from __future__ import annotations

import json
import pickle
import re
import shutil
from collections import Counter

import pytest
from click.testing import CliRunner

from formats.errors import UserError
from trainer import tokenizers
from trainer.cli import main
from trainer.config import FinetuningDatasetConfig
from trainer.data import build
from trainer.data.chat.packed import pack

BYTE = tokenizers.load("byte")
LENGTH = 64


@pytest.fixture
def sources(tmp_path):
    """Three files, whose examples say which they are of."""
    made = {}
    for name, count in (("a", 60), ("b", 30), ("c", 10)):
        made[name] = tmp_path / f"{name}.jsonl"
        pairs = [{"prompt": f"{name}{number:02}? ", "completion": "yes " * (1 + number % 9)} for number in range(count)]
        made[name].write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    return made


def made(samples, **settings):
    config = FinetuningDatasetConfig(sequence_length=LENGTH, **settings)
    return build(config, tokenizer=BYTE, vocab_size=384, samples=samples)


def text(row):
    return BYTE.decode(row["tokens"].tolist())


def source_of(row):
    (source,) = {part[-3:-2] for part in text(row).split("?")[:-1]}
    return source


def test_rows_come_from_sources_by_their_weights(sources):
    blend = [0.2, str(sources["a"]), 0.3, str(sources["b"]), 0.5, str(sources["c"])]
    train, valid, _ = made((400, 0, 0), blend=blend)
    counted = Counter(source_of(train[number]) for number in range(400))
    assert counted == {"a": 80, "b": 120, "c": 200}
    assert valid is None


def test_a_sample_does_not_depend_on_how_many_are_asked_for_and_travels(sources):
    blend = [0.2, str(sources["a"]), 0.8, str(sources["b"])]
    short, long = (made((count, 0, 0), blend=blend)[0] for count in (50, 300))
    assert [text(short[n]) for n in range(50)] == [text(long[n]) for n in range(50)]
    again = pickle.loads(pickle.dumps(long))
    assert [text(again[n]) for n in range(200, 300)] == [text(long[n]) for n in range(200, 300)]


def test_without_weights_each_source_has_as_many_rows_as_it_fills(sources):
    blend = [str(sources["a"]), str(sources["b"])]
    alone = [made((1, 0, 0), path=path, split="100,0,0")[0].per_epoch for path in blend]
    train, *_ = made((sum(alone), 0, 0), blend=blend, split="100,0,0")
    counted = Counter(source_of(train[number]) for number in range(len(train)))
    assert [counted["a"], counted["b"]] == alone
    questions = Counter(part[-3:] for number in range(len(train)) for part in text(train[number]).split("?")[:-1])
    assert set(questions.values()) == {1}
    assert len(questions) == 90


def test_what_was_found_is_told_of_each_source(sources):
    train, *_ = made((8, 0, 0), blend=[str(sources["a"]), str(sources["c"])])
    assert [line.split(": ")[:2] for line in train.summary] == [
        [f"`{sources['a']}`", "60 examples of 1 file"],
        [f"`{sources['c']}`", "10 examples of 1 file"],
    ]


def test_what_is_held_out_of_several_is_a_set_each(sources, tmp_path):
    _, valid, test = made(
        (8, 4, 2), path=str(sources["a"]), validation_path=[str(sources["b"]), str(sources["c"])], test_path=[str(sources["b"])]
    )
    assert {name: {source_of(split[n]) for n in range(len(split))} for name, split in valid.items()} == {"b": {"b"}, "c": {"c"}}
    assert [len(split) for split in (*valid.values(), test)] == [4, 4, 2]
    (tmp_path / "other").mkdir()
    twin = tmp_path / "other" / "b.jsonl"
    twin.write_bytes(sources["b"].read_bytes())
    _, valid, _ = made((8, 4, 0), path=str(sources["a"]), validation_path=[str(sources["b"]), str(twin)])
    assert list(valid) == [str(sources["b"]), str(twin)]


@pytest.fixture
def packed(sources, tmp_path):
    """The three files packed with weights, two of them held out, by the command: the folder and what it said of each part."""
    out = tmp_path / "packed"
    overrides = [
        f"dataset.blend=[0.2,{sources['a']},0.3,{sources['b']},0.5,{sources['c']}]",
        f"dataset.validation_path=[{sources['b']},{sources['c']}]",
        f"dataset.test_path={sources['a']}",
        f"dataset.sequence_length={LENGTH}",
        "tokenizer.tokenizer_model=byte",
    ]
    result = CliRunner().invoke(main, ["pack", "llama_tiny", str(out), *overrides, "--json"])
    assert result.exit_code == 0, result.output
    return out, json.loads(result.stdout)


def test_several_sources_are_packed_with_their_weights(packed):
    out, report = packed
    assert [(part["split"], part["source"], part["weight"], part["examples"]) for part in report] == [
        ("train", "a", 0.2, 60),
        ("train", "b", 0.3, 30),
        ("train", "c", 0.5, 10),
        ("validation", "b", None, 30),
        ("validation", "c", None, 10),
        ("test", "a", None, 60),
    ]
    train, valid, test = made((400, 4, 2), path=str(out))
    assert Counter(source_of(train[number]) for number in range(400)) == {"a": 80, "b": 120, "c": 200}
    assert {name: {source_of(split[n]) for n in range(len(split))} for name, split in valid.items()} == {"b": {"b"}, "c": {"c"}}
    assert {source_of(test[number]) for number in range(2)} == {"a"}
    assert [line.split(": ")[:2] for line in train.summary] == [
        ["`a`", "60 examples of 1 file"],
        ["`b`", "30 examples of 1 file"],
        ["`c`", "10 examples of 1 file"],
    ]


def test_packed_sources_have_every_example_in_an_epoch_and_the_same_rows_for_any_length(packed):
    out, report = packed
    rows = {part["source"]: part["rows"] for part in report if part["split"] == "train"}
    short, long = (made((count, 0, 0), path=str(out))[0] for count in (50, 400))
    assert [text(short[n]) for n in range(50)] == [text(long[n]) for n in range(50)]
    travelled = pickle.loads(pickle.dumps(long))
    assert [text(travelled[n]) for n in range(400)] == [text(long[n]) for n in range(400)]
    for name, examples in (("a", 60), ("b", 30), ("c", 10)):
        own = [text(long[n]) for n in range(400) if source_of(long[n]) == name]
        questions = Counter(part[-3:] for row in own[: rows[name]] for part in row.split("?")[:-1])
        assert len(questions) == examples
        assert set(questions.values()) == {1}


def test_packed_sources_without_weights_have_as_many_rows_as_they_fill(sources, tmp_path):
    out = tmp_path / "out"
    blend = [str(sources["a"]), str(sources["b"])]
    config = FinetuningDatasetConfig(sequence_length=LENGTH, blend=blend, split="100,0,0")
    rows = [part.rows for part in pack(config, out, tokenizer=BYTE, vocab_size=384, note=pytest.fail)]
    train, *_ = made((sum(rows), 0, 0), path=str(out))
    counted = Counter(source_of(train[number]) for number in range(len(train)))
    assert [counted["a"], counted["b"]] == rows


def test_shares_of_several_sources_are_packed_apart(sources, tmp_path):
    out = tmp_path / "out"
    config = FinetuningDatasetConfig(sequence_length=LENGTH, blend=[str(sources["a"]), str(sources["b"])], split="80,20,0")
    done = pack(config, out, tokenizer=BYTE, vocab_size=384, note=pytest.fail)
    assert [(part.split, part.source, part.examples) for part in done] == [
        ("train", "a", 48), ("train", "b", 24), ("validation", "a", 12), ("validation", "b", 6),
    ]  # fmt: skip
    train, valid, _ = made((done[0].rows + done[1].rows, 8, 0), path=str(out))
    learned = {part[-3:] for n in range(len(train)) for part in text(train[n]).split("?")[:-1]}
    held_out = {part[-3:] for split in valid.values() for n in range(len(split)) for part in text(split[n]).split("?")[:-1]}
    assert len(learned) == 72
    assert not learned & held_out


def test_a_packed_folder_without_one_of_its_sources_is_refused(packed):
    shutil.rmtree(packed[0] / "train" / "1")
    with pytest.raises(UserError) as caught:
        made((8, 0, 0), path=str(packed[0]))
    assert str(caught.value) == (
        f"`{packed[0]}/train` has 2 of 3 sources\n\nhint: copy the whole folder, or pack the examples again"
    )


def test_pack_says_what_it_made_of_each_source(sources, tmp_path):
    overrides = [
        f"dataset.blend=[1,{sources['a']},3,{sources['b']}]",
        f"dataset.sequence_length={LENGTH}",
        "dataset.split='100,0,0'",
        "tokenizer.tokenizer_model=byte",
    ]
    result = CliRunner().invoke(main, ["pack", "llama_tiny", str(tmp_path / "out"), *overrides])
    lines = result.stderr.splitlines()
    assert [re.sub(r"[\d.]+ %", "… %", re.sub(r"in \d+ rows", "in … rows", line)) for line in lines[-3:]] == [
        "train, `a`: 60 examples in … rows, … % filled, weight 1",
        "train, `b`: 30 examples in … rows, … % filled, weight 3",
        f"done: {tmp_path / 'out'}",
    ]
    assert [line.split(": ")[:2] for line in lines[:2]] == [["`a`", "60 examples of 1 file"], ["`b`", "30 examples of 1 file"]]


@pytest.mark.parametrize(("option", "printed"), [([], True), (["--quiet"], False)])
def test_pack_notes_each_source_whose_default_share_leaves_no_validation(option, printed, sources, tmp_path):
    """As a run with the same files does; examples enough for validation are not noted, shares that somebody chose are refused."""
    few = tmp_path / "few.jsonl"
    few.write_text("".join(sources["c"].read_text().splitlines(keepends=True)[:3]))
    overrides = [
        f"dataset.blend=[{sources['a']},{few},{sources['c']}]",
        f"dataset.sequence_length={LENGTH}",
        "tokenizer.tokenizer_model=byte",
    ]
    result = CliRunner().invoke(main, ["pack", "llama_tiny", str(tmp_path / "out"), *overrides, *option])
    assert result.exit_code == 0
    train, *_ = made((1, 1, 0), blend=[str(sources["a"]), str(few), str(sources["c"])])
    notes = [line for line in train.summary if line.startswith("note: ")]
    assert notes == [f"note: `dataset.split=95,5,0` of {count} examples leaves none for validation" for count in (3, 10)]
    assert [line for line in result.stderr.splitlines() if line.startswith("note: ")] == (notes if printed else [])
    chosen = CliRunner().invoke(main, ["pack", "llama_tiny", str(tmp_path / "other"), *overrides, 'dataset.split="96,4,0"'])
    assert (chosen.exit_code, (tmp_path / "other").exists()) == (1, False)
    assert "error: `dataset.split=96,4,0` of 3 examples leaves none for validation\n" in chosen.stderr


def test_a_data_set_travels_without_the_rows_of_its_epochs(sources):
    train, *_ = made((400, 0, 0), path=str(sources["a"]))
    rows = [text(train[number]) for number in range(400)]
    assert len(pickle.dumps(train)) == len(pickle.dumps(made((400, 0, 0), path=str(sources["a"]))[0]))
    again = pickle.loads(pickle.dumps(train))
    assert not again._open_epochs
    assert [text(again[number]) for number in range(400)] == rows
