"""Prepared data against megatron-core's own writer and reader."""

from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from click.testing import CliRunner
from datasets import Dataset, DatasetDict
from megatron.core.datasets.indexed_dataset import DType, IndexedDataset, IndexedDatasetBuilder
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from converter import Reporter
from formats.errors import TransientError, UserError
from trainer import tokenizers
from trainer.commands.prepare_data import command
from trainer.data.prepare import prepare

pytestmark = pytest.mark.filterwarnings("ignore:Could not determine rank:UserWarning")  # megatron-core's, of a lone process

WORDS = ["the", "quick", "brown", "fox", "jumps", "over", "a", "lazy", "dog", "größer", "日本", "🙂"]


@pytest.fixture(scope="module")
def texts():
    chosen = random.Random(1)
    return [" ".join(chosen.choices(WORDS, k=chosen.randrange(1, 60))) for _ in range(40)]


@pytest.fixture(scope="module")
def trained(tmp_path_factory, texts):
    folder = tmp_path_factory.mktemp("tokenizer")
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    made.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=300, special_tokens=["</s>"], initial_alphabet=alphabet, show_progress=False)
    )
    made.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text('{"eos_token": "</s>"}')
    return str(folder)


def as_text(folder, texts):
    folder.mkdir()
    for number, text in enumerate(texts):
        (folder / f"{number:03}.txt").write_text(text)
    return folder


def as_jsonl(folder, texts):
    folder.mkdir()
    (folder / "a.jsonl").write_text("".join(json.dumps({"id": 1, "text": text}) + "\n" for text in texts[:25]) + "\n")
    (folder / "b.jsonl").write_text("\n".join(json.dumps({"text": text}, ensure_ascii=False) for text in texts[25:]))
    return folder


def as_parquet(folder, texts):
    folder.mkdir()
    pq.write_table(pa.table({"n": range(len(texts)), "text": texts}), folder / "a.parquet", row_group_size=7)
    return folder


def naively(prefix, texts, tokenizer, *, eod=True):
    """The files as megatron-core's tools would write them, one document after the other; their bytes."""
    encoder = tokenizers.load(tokenizer)
    builder = IndexedDatasetBuilder(f"{prefix}.bin", DType.optimal_dtype(encoder.vocab_size))
    for text in texts:
        builder.add_item(torch.tensor(encoder.encode(text) + [encoder.eod] * eod))
        builder.end_document()
    builder.finalize(f"{prefix}.idx")
    return pair(prefix)


def pair(prefix):
    return Path(f"{prefix}.bin").read_bytes(), Path(f"{prefix}.idx").read_bytes()


@pytest.mark.parametrize("kind", [as_text, as_jsonl, as_parquet])
def test_bytes_are_those_of_megatron_core_over_one_document_after_the_other(kind, texts, trained, tmp_path):
    source = kind(tmp_path / "in", texts)
    for name, tokenizer in (("byte", "byte"), ("bpe", trained)):
        done = prepare([source], tmp_path / name, tokenizer=tokenizer)
        assert pair(tmp_path / name) == naively(tmp_path / "naive", texts, tokenizer)
        assert done.documents == len(texts)
        assert done.tokens == len(pair(tmp_path / name)[0]) // np.dtype(done.dtype).itemsize
    assert not list(tmp_path.glob("*.partial-*"))


def test_bytes_do_not_depend_on_workers(texts, trained, tmp_path, monkeypatch):
    monkeypatch.setattr("trainer.data.prepare._BATCH_BYTES", 500)
    sources = [as_jsonl(tmp_path / "one", texts), as_text(tmp_path / "two", texts[:9]), as_parquet(tmp_path / "three", texts)]
    for workers in (1, 2):
        prepare(sources, tmp_path / str(workers), tokenizer=trained, workers=workers, append_eod=False)
    assert pair(tmp_path / "1") == pair(tmp_path / "2")
    assert pair(tmp_path / "1") == naively(tmp_path / "naive", texts + texts[:9] + texts, trained, eod=False)


def test_megatron_core_reads_documents_and_empty_ones_are_counted_and_left_out(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"body": "ab"}\n\n{"body": ""}\n{"body": "c"}\r\n')
    done = prepare([tmp_path / "a.jsonl"], tmp_path / "deep" / "er" / "out", tokenizer="byte", key="body")
    dataset = IndexedDataset(done.prefix)
    assert [dataset[0].tolist(), dataset[1].tolist()] == [[97, 98, 256], [99, 256]]
    assert dataset.document_indices.tolist() == [0, 1, 2]
    assert (done.documents, done.empty, done.tokens, done.dtype) == (2, 1, 5, "uint16")


def test_a_folder_is_read_by_name_and_hidden_or_other_files_are_left_out(tmp_path):
    for name in ("b/z.py", "a.md", "b/a.txt", ".git/x.txt", "b/.hidden.txt", "c.csv"):
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "in" / name).write_text(name)
    done = prepare([tmp_path / "in"], tmp_path / "out", tokenizer="byte", append_eod=False)
    assert Path(f"{done.prefix}.bin").read_bytes()[::2] == b"a.mdb/a.txtb/z.py"


def run(*arguments):
    return CliRunner().invoke(command, [str(argument) for argument in arguments], catch_exceptions=False)


def test_the_command_says_on_stderr_what_was_done_and_on_stdout_json(tmp_path):
    (tmp_path / "a.txt").write_text("hello")
    (tmp_path / "b.txt").write_text("")
    result = run(tmp_path / "a.txt", tmp_path / "b.txt", tmp_path / "out", "--tokenizer", "byte")
    assert result.exit_code == 0
    assert result.stdout == ""
    assert result.stderr.startswith(
        "note: 1 documents without text were left out\ndone: 1 documents, 6 tokens, 5 B read, 74 B written"
    )
    again = run(tmp_path / "a.txt", tmp_path / "out", "--tokenizer", "byte", "--overwrite", "--json", "--no-append-eod")
    report = json.loads(again.stdout)
    assert (report["documents"], report["tokens"], report["output_bytes"]) == (1, 5, 72)


def refused(tmp_path, *inputs, prefix="out", **options):
    before = {path.name for path in tmp_path.iterdir()}
    with pytest.raises(UserError) as error:
        prepare([tmp_path / name for name in inputs], tmp_path / prefix, tokenizer="byte", **options)
    assert {path.name for path in tmp_path.iterdir()} == before
    return str(error.value).replace(str(tmp_path), "T").split("\n")[0]


@pytest.mark.filterwarnings("ignore::DeprecationWarning:datasets", "ignore::ResourceWarning")
def test_a_folder_that_datasets_saved_is_read_like_a_file(tmp_path):
    texts = ["one", "two words", "three"]
    rows = Dataset.from_list([{"n": number, "text": text} for number, text in enumerate(texts)])
    rows.save_to_disk(tmp_path / "saved", num_shards=2)
    prepare([tmp_path / "saved"], tmp_path / "out", tokenizer="byte")
    assert pair(tmp_path / "out") == naively(tmp_path / "naive", texts, "byte")
    assert refused(tmp_path, "saved", prefix="x", key="n") == "column `n` of `T/saved` is not text: its type is int64"
    DatasetDict(test=rows, train=rows).save_to_disk(tmp_path / "two")
    assert refused(tmp_path, "two", prefix="x") == "`T/two` has several splits: `test`, `train`"
    DatasetDict(train=rows).save_to_disk(tmp_path / "one")
    prepare([tmp_path / "one"], tmp_path / "again", tokenizer="byte")
    assert pair(tmp_path / "again") == pair(tmp_path / "out")


def test_a_data_set_of_the_hub_is_named_as_elsewhere(tmp_path):
    with pytest.raises(UserError, match=r"`hf://org/name` is not a dataset URL of the Hub"):
        run("hf://org/name", tmp_path / "out", "--tokenizer", "byte")


LINES = {
    b'{"text": "a" "b"}': " cannot be read: it is not JSON: the fault is at line 1, column 14",
    b'{"body": 1, "id": 2}': " has no key `text`: it has `body`, `id`",
    b"[1]": " cannot be read: it is not a JSON object: it is [1]",
    b'{"text": 3}': ": `text` is not text: it is a int",
    b'{"text": "\\ud800"}': ": `text` contains an unpaired surrogate, which is not valid text",
    b'{"text": "\xff"}': " cannot be read: it is not UTF-8: byte 10 is not UTF-8",
}


@pytest.mark.parametrize("line", LINES)
def test_a_bad_line_is_named_and_nothing_is_left(line, tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "fine"}\n' + line + b'\n{"text": "fine"}\n')
    assert refused(tmp_path, "a.jsonl") == f"`T/a.jsonl`, line 2{LINES[line]}"


def test_of_several_bad_lines_the_first_is_named_whatever_the_workers(tmp_path, monkeypatch):
    monkeypatch.setattr("trainer.data.prepare._BATCH_BYTES", 1)
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "fine"}\n[1]\n[2]\n{}\n')
    messages = {refused(tmp_path, "a.jsonl", workers=workers) for workers in (1, 2)}
    assert messages == {"`T/a.jsonl`, line 2 cannot be read: it is not a JSON object: it is [1]"}


def test_bad_files_are_named(tmp_path, monkeypatch):
    (tmp_path / "a.csv").write_text("x")
    (tmp_path / "empty").mkdir()
    (tmp_path / "bad.parquet").write_bytes(b"not parquet")
    (tmp_path / "latin.txt").write_bytes(b"gr\xfc\xdfe")
    (tmp_path / "nothing.txt").write_text("")
    pq.write_table(pa.table({"n": [1], "text": pa.array([None], pa.string())}), tmp_path / "null.parquet")
    assert refused(tmp_path, "a.csv") == "`T/a.csv` is not a supported document file"
    assert refused(tmp_path, "empty") == "`T/empty` has no supported document files"
    assert refused(tmp_path, "none.txt") == "`T/none.txt` does not exist"
    assert refused(tmp_path, "bad.parquet").startswith("`T/bad.parquet` is not readable as parquet")
    assert refused(tmp_path, "null.parquet") == "`T/null.parquet`, row 1 has no text: `text` is null"
    assert refused(tmp_path, "null.parquet", key="n") == "column `n` of `T/null.parquet` is not text: its type is int64"
    assert refused(tmp_path, "null.parquet", key="x") == "`T/null.parquet` has no column `x`: it has `n`, `text`"
    assert refused(tmp_path, "latin.txt") == "`T/latin.txt` is not UTF-8 text: byte 2 is not UTF-8"
    assert refused(tmp_path, "nothing.txt") == "the inputs have no text"
    assert refused(tmp_path, "a.csv", prefix="out.bin") == "`T/out.bin` is a file name, not a prefix"
    monkeypatch.setattr("trainer.data.records.MAX_RECORD_BYTES", 2)
    assert refused(tmp_path, "latin.txt") == "`T/latin.txt` is longer than 2 bytes, the limit for one document"


def test_existing_output_is_refused_and_survives_a_failed_overwrite(tmp_path):
    (tmp_path / "a.txt").write_text("hello")
    (tmp_path / "b.jsonl").write_text("broken")
    prepare([tmp_path / "a.txt"], tmp_path / "out", tokenizer="byte")
    first = pair(tmp_path / "out")
    assert refused(tmp_path, "a.txt") == "`T/out.bin` already exists"
    assert refused(tmp_path, "b.jsonl", overwrite=True).startswith("`T/b.jsonl`, line 1 cannot be read: it is not JSON")
    assert pair(tmp_path / "out") == first
    (tmp_path / "a.txt").write_text("other")
    prepare([tmp_path / "a.txt"], tmp_path / "out", tokenizer="byte", overwrite=True)
    assert pair(tmp_path / "out") == naively(tmp_path / "naive", ["other"], "byte")


@pytest.mark.parametrize("index", [None, b"no index of Megatron's"])
def test_overwriting_takes_data_of_megatrons_and_nothing_else(tmp_path, index):
    (tmp_path / "a.txt").write_text("hello")
    (tmp_path / "out.bin").write_bytes(b"months of work")
    if index:
        (tmp_path / "out.idx").write_bytes(index)
    message = refused(tmp_path, "a.txt", overwrite=True)
    assert message == "`T/out.idx` is not a Megatron index, so `--overwrite` does not replace `T/out.bin`"
    assert (tmp_path / "out.bin").read_bytes() == b"months of work"


@pytest.mark.parametrize("overwrite", [False, True])
def test_what_another_wrote_there_meanwhile_stays(tmp_path, overwrite):
    (tmp_path / "a.txt").write_text("hello")
    (tmp_path / "b.txt").write_text("another text")
    for text in ("a", "b"):
        prepare([tmp_path / f"{text}.txt"], tmp_path / text, tokenizer="byte")
    if overwrite:
        copy_pair(tmp_path / "a", tmp_path / "out")
    with pytest.raises(TransientError, match="appeared or changed while it was being written"):
        prepare(
            [tmp_path / "a.txt"], tmp_path / "out", tokenizer="byte", overwrite=overwrite,
            reporter=Reporter(progress=lambda _count: copy_pair(tmp_path / "b", tmp_path / "out")),
        )  # fmt: skip
    assert pair(tmp_path / "out") == pair(tmp_path / "b")


def copy_pair(source, target):
    for suffix in (".bin", ".idx"):
        target.with_suffix(suffix).write_bytes(source.with_suffix(suffix).read_bytes())
