"""Several sources: mixed by weight for training, and evaluated each by itself."""

from __future__ import annotations

import json
import pickle
from collections import Counter

import pytest

from formats.errors import UserError
from trainer import tokenizers
from trainer.config import FinetuningDatasetConfig
from trainer.data import build
from trainer.data.chat.build import pack

BYTE = tokenizers.load("byte")
LENGTH = 64


@pytest.fixture
def sources(tmp_path):
    """Three files, whose examples say which they are of."""
    made = {}
    for name, count in (("a", 60), ("b", 30), ("c", 10)):
        made[name] = tmp_path / f"{name}.jsonl"
        pairs = [{"prompt": f"{name}{number:02}? ", "completion": "yes " * (1 + number % 9)} for number in range(count)]
        made[name].write_text("".join(json.dumps(one) + "\n" for one in pairs))
    return made


def made(samples, **told):
    config = FinetuningDatasetConfig(sequence_length=LENGTH, **told)
    return build(config, tokenizer=BYTE, vocab_size=384, samples=samples)


def text(row):
    return BYTE.decode(row["tokens"].tolist())


def source_of(row):
    (found,) = {part[-3:-2] for part in text(row).split("?")[:-1]}
    return found


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
    assert {name: {source_of(one[n]) for n in range(len(one))} for name, one in valid.items()} == {"b": {"b"}, "c": {"c"}}
    assert [len(one) for one in (*valid.values(), test)] == [4, 4, 2]
    (tmp_path / "other").mkdir()
    twin = tmp_path / "other" / "b.jsonl"
    twin.write_bytes(sources["b"].read_bytes())
    _, valid, _ = made((8, 4, 0), path=str(sources["a"]), validation_path=[str(sources["b"]), str(twin)])
    assert list(valid) == [str(sources["b"]), str(twin)]


def test_several_sources_are_not_packed_beforehand(sources, tmp_path):
    for told in ({"blend": [str(sources["a"])]}, {"path": str(sources["a"]), "validation_path": [str(sources["b"])]}):
        config = FinetuningDatasetConfig(sequence_length=LENGTH, **told)
        with pytest.raises(UserError, match="`mbtrain pack` packs one source per split, and several are set"):
            pack(config, tmp_path / "out", tokenizer=BYTE, vocab_size=384)
