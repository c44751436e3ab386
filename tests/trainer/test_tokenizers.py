"""Tokenizers against the libraries that made them."""

from __future__ import annotations

import json

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, ByT5Tokenizer

from formats.errors import UserError
from trainer import tokenizers

TEXT = "Grüße,\n\tworld! 日本 🙂 <|endoftext|> x"


@pytest.fixture
def folder(tmp_path):
    """A byte-level BPE trained here, whose file asks for a begin token and for cutting."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet, show_progress=False)
    made.train_from_iterator(["the quick brown fox jumps over the lazy dog"] * 5, trainer)
    made.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    made.enable_truncation(4)
    made.enable_padding(length=9, pad_id=0, pad_token="<s>")
    made.save(str(tmp_path / "tokenizer.json"))
    eos = {"__type": "AddedToken", "content": "</s>", "special": True}
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": eos}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    return tmp_path


def test_bytes_are_utf8(tmp_path):
    tokenizer = tokenizers.load("byte")
    assert tokenizer.encode(TEXT) == list(TEXT.encode())
    assert tokenizer.decode(tokenizer.encode(TEXT)) == TEXT
    assert (tokenizer.eod, tokenizer.vocab_size) == (256, 257)
    assert tokenizer.decode([104, 256, 300, 105]) == "h<|endoftext|>i"


def test_saved_bytes_load_the_same_and_in_transformers(tmp_path):
    tokenizer = tokenizers.load("byte")
    tokenizer.save(tmp_path)
    again, other = tokenizers.load(str(tmp_path)), AutoTokenizer.from_pretrained(tmp_path)
    text = TEXT.replace("<|endoftext|>", "")
    assert tokenizer.encode(text) == again.encode(text) == other(text, add_special_tokens=False)["input_ids"]
    assert (again.eod, again.vocab_size) == (other.eos_token_id, len(other)) == (256, 257)
    assert again.decode([104, 256, 300, 105]) == "h<|endoftext|>i"


def test_a_folder_encodes_as_transformers_does_without_special_tokens_cutting_or_padding(folder):
    tokenizer, other = tokenizers.load(str(folder)), AutoTokenizer.from_pretrained(folder)
    text = "the quick brown fox " * 9
    assert tokenizer.encode(text) == other(text, add_special_tokens=False, truncation=False, padding=False)["input_ids"]
    assert len(tokenizer.encode("fox")) < 9
    assert (tokenizer.eod, tokenizer.vocab_size) == (other.eos_token_id, len(other))
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_a_saved_folder_loads_the_same(folder, tmp_path):
    tokenizers.load(str(folder)).save(tmp_path / "copy")
    again = tokenizers.load(str(tmp_path / "copy"))
    assert again.encode("lazy dog") == tokenizers.load(str(folder)).encode("lazy dog")
    assert again.eod == tokenizers.load(str(folder)).eod


def test_a_folder_without_tokenizer_json_is_read_by_transformers(folder, tmp_path):
    model = json.loads((folder / "tokenizer.json").read_text())["model"]
    old = tmp_path / "old"
    old.mkdir()
    (old / "vocab.json").write_text(json.dumps(model["vocab"]))
    (old / "merges.txt").write_text("\n".join(" ".join(pair) for pair in model["merges"]))
    (old / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "GPT2Tokenizer", "eos_token": "</s>"}))
    tokenizer = tokenizers.load(str(old))
    assert tokenizer.encode("the quick dog") == tokenizers.load(str(folder)).encode("the quick dog")
    assert tokenizer.eod == model["vocab"]["</s>"]


@pytest.mark.parametrize(
    ("name", "content", "number"), [("generation_config.json", [1, 5], 1), ("config.json", 7, 7)], ids=["generation", "config"]
)
def test_the_end_of_a_document_is_also_found_in_other_files(folder, name, content, number):
    (folder / "tokenizer_config.json").unlink()
    (folder / name).write_text(json.dumps({"eos_token_id": content}))
    assert tokenizers.load(str(folder)).eod == number


def message(name):
    with pytest.raises(UserError) as error:
        tokenizers.load(str(name))
    return str(error.value).split("\n")[0]


def test_what_a_folder_lacks_is_named(folder, tmp_path):
    (folder / "tokenizer_config.json").write_text("{}")
    assert message(folder) == f"`{folder}` names no end-of-document token"
    (folder / "tokenizer_config.json").write_text('{"eos_token": "<end>"}')
    wrong = f"`{folder}/tokenizer_config.json` names `<end>` as its end-of-document token, which the tokenizer does not have"
    assert message(folder) == wrong
    (folder / "tokenizer.json").write_text("{}")
    assert message(folder) == f"`{folder}/tokenizer.json` is not readable as a tokenizer"
    (tmp_path / "empty").mkdir()
    assert message(tmp_path / "empty") == f"`{tmp_path}/empty` has no tokenizer: there is no `tokenizer.json`"
    assert message(tmp_path / "none") == f"`{tmp_path}/none` is not a folder"


def test_a_tokenizer_written_in_python_is_read_by_transformers(tmp_path):
    ByT5Tokenizer().save_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").unlink(missing_ok=True)
    tokenizer, other = tokenizers.load(str(tmp_path)), ByT5Tokenizer()
    assert not other.is_fast
    assert tokenizer.encode("grün") == other("grün", add_special_tokens=False)["input_ids"]
    assert tokenizer.decode(tokenizer.encode("grün")) == "grün"
    assert (tokenizer.eod, tokenizer.vocab_size) == (other.eos_token_id, len(other))


SENTENCEPIECE = bytes([10, 14, 10, 5, 60, 117, 110, 107, 62, 21, 0, 0, 0, 0, 24, 2])
TIKTOKEN = b"IQ== 0\nIg== 1\nIw== 2\n"


@pytest.mark.parametrize(
    ("data", "lacking", "message"),
    [
        (SENTENCEPIECE, {"sentencepiece"}, ("a SentencePiece model, and the package `sentencepiece` is not installed"
         "\n\nhint: pip install sentencepiece")),
        (SENTENCEPIECE, {"sentencepiece", "google.protobuf"}, ("a SentencePiece model, and the packages `sentencepiece` and "
         "`protobuf` are not installed\n\nhint: pip install sentencepiece protobuf")),
        (TIKTOKEN, {"tiktoken"}, "a tiktoken model, and the package `tiktoken` is not installed\n\nhint: pip install tiktoken"),
    ],
    ids=["sentencepiece", "both", "tiktoken"],
)  # fmt: skip
def test_the_package_that_a_tokenizer_needs_is_named(tmp_path, monkeypatch, data, lacking, message):
    """transformers names another one, which it tries last."""
    monkeypatch.setattr(tokenizers, "_installed", lambda module: module not in lacking)
    (tmp_path / "tokenizer.model").write_bytes(data)
    error = tokenizers.unreadable("`T` cannot be read", tmp_path, ValueError("a library's words"))
    assert str(error) == f"`T` cannot be read: `tokenizer.model` is {message}"


def test_a_folder_with_a_model_of_sentencepiece_alone_names_the_package_when_it_is_loaded(tmp_path, monkeypatch):
    monkeypatch.setattr(tokenizers, "_installed", lambda module: module != "sentencepiece")
    (tmp_path / "tokenizer.model").write_bytes(SENTENCEPIECE)
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "LlamaTokenizer"}')
    with pytest.raises(UserError, match=r"the package `sentencepiece` is not installed\n\nhint: pip install sentencepiece$"):
        tokenizers.load(str(tmp_path))


def test_what_else_makes_a_tokenizer_unreadable_is_told_by_its_class(tmp_path):
    error = tokenizers.unreadable("`T` cannot be read", tmp_path, ValueError("a library's words"))
    assert error.args[0] == "`T` cannot be read (`ValueError`)"
    error = tokenizers.unreadable("`T` cannot be read", tmp_path, ModuleNotFoundError("a library's words", name="other.part"))
    assert str(error) == "`T` cannot be read: the package `other` is not installed\n\nhint: install that package"
