"""What these tests share."""

from __future__ import annotations

import json

import pytest

from formats.errors import UserError
from tests.trainer.chat import llama
from trainer import tokenizers
from trainer.config import FinetuningDatasetConfig
from trainer.data.chat.examples import Counts, read_examples
from trainer.data.chat.sources import Source


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """A tokenizer whose template has no marks."""
    return llama.save(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="session")
def tokenizer(folder):
    return tokenizers.load(str(folder))


@pytest.fixture
def template(tmp_path):
    """Makes a file with a template."""

    def make(text):
        path = tmp_path / f"{abs(hash(text))}.jinja"
        path.write_text(text)
        return str(path)

    return make


@pytest.fixture
def learn(tmp_path, tokenizer):
    """Reads examples, given as objects or as lines, from a file of JSON lines: a list of (tokens, trained)."""

    def read(*examples, tokenizer=tokenizer, counts=None, **settings):
        path = tmp_path / "a.jsonl"
        path.write_text("".join(f"{example if isinstance(example, str) else json.dumps(example)}\n" for example in examples))
        config = FinetuningDatasetConfig(**settings)
        learned = read_examples(Source(path), tokenizer, config, counts=Counts() if counts is None else counts)
        return [(example.tokens.tolist(), example.trained.astype(int).tolist()) for example in learned]

    return read


@pytest.fixture
def refusal(learn, tmp_path):
    """What is said of examples that cannot be learned from, without the folder's name."""

    def read(*examples, **settings):
        with pytest.raises(UserError) as error:
            learn(*examples, **settings)
        return str(error.value).replace(f"{tmp_path}/", "")

    return read
