"""Ranks that read other data than rank 0 are found before the first step."""

from __future__ import annotations

import json
import os
import shutil

import pytest

from formats.errors import UserError
from trainer.config import DatasetConfig, FinetuningDatasetConfig
from trainer.data.prepare import prepare


def _two_hosts(tmp_path, make):
    """Folders of two hosts, in each of which `make` has put something."""
    for host in ("a", "b"):
        (tmp_path / host).mkdir()
        make(tmp_path / host)
    return [str(tmp_path / host) for host in ("a", "b")]


def _texts(letter):
    def make(folder):
        for name, word in (("one", "word"), ("two", letter if folder.name == "b" else "word")):
            (folder / "text").mkdir(exist_ok=True)
            (folder / "text" / "0.txt").write_text(f"a {word} here. " * 40)
            prepare([folder / "text"], folder / name, tokenizer="byte")

    return make


def _examples(answer):
    def make(folder):
        lines = [{"prompt": f"{n}?", "completion": answer if (n, folder.name) == (7, "b") else "good"} for n in range(8)]
        (folder / "examples.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))

    return make


def _read(folders, config, tokenizer, lengths):
    """What building datasets says to a rank that is on a host of its own."""
    from torch import distributed

    from trainer import tokenizers
    from trainer.data import build, consistency

    rank = int(os.environ["RANK"])
    os.chdir(folders[rank])
    os.environ["LOCAL_RANK"] = "0"
    distributed.init_process_group("gloo")
    try:
        loaded = tokenizers.load(tokenizer)
        made = build(config, tokenizer=loaded, vocab_size=1000, samples=lengths)
        consistency.check_ranks(made, loaded)
    except UserError as error:
        return str(error)
    return ""


DATA = {
    "one": DatasetConfig(sequence_length=32, blend=["one"], split="1,0,0"),
    "two": DatasetConfig(sequence_length=32, blend=["two"], split="1,0,0"),
    "blend": DatasetConfig(sequence_length=32, blend=["one", "two"], split="1,0,0"),
}


@pytest.mark.parametrize("letter", ["word", "other", "lord"])  # of another length, and of the same
def test_text_that_is_another_on_one_host_is_named(letter, ranks, tmp_path):
    folders = _two_hosts(tmp_path, _texts(letter))
    for name, config in DATA.items():
        messages = ranks.run(_read, 2, folders, config, "byte", (8, 0, 0))
        assert messages[0] == messages[1]
        if letter == "word" or name == "one":
            assert messages[0] == ""
            continue
        assert messages[0].startswith("ranks read different data: the training data of rank 1, on `")
        assert messages[0].endswith(
            "\n\nhint: copy the same files to all hosts, under the same names; or name files on a disk that they share"
        )


@pytest.mark.parametrize("answer", ["good", "best", "much better"])
def test_an_example_that_is_another_on_one_host_is_named(answer, ranks, tmp_path):
    folders = _two_hosts(tmp_path, _examples(answer))
    config = FinetuningDatasetConfig(sequence_length=32, path="examples.jsonl", split="1,0,0")
    for message in ranks.run(_read, 2, folders, config, "byte", (8, 0, 0)):
        assert ("the training data of rank 1, on `" in message) == (answer != "good")


def test_a_tokenizer_that_is_another_on_one_host_is_named(ranks, model_folder, tmp_path):
    folders = _two_hosts(tmp_path, lambda folder: shutil.copytree(model_folder(), folder / "model"))
    config = DatasetConfig(sequence_length=32)
    assert ranks.run(_read, 2, folders, config, "model", (8, 0, 0)) == ["", ""]
    file = tmp_path / "b" / "model" / "tokenizer_config.json"
    file.write_text(file.read_text() + " ")
    for message in ranks.run(_read, 2, folders, config, "model", (8, 0, 0)):
        assert "the tokenizer's `tokenizer_config.json` of rank 1, on `" in message
