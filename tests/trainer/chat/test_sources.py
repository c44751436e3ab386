"""Files of every kind give the same examples, each with its place."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset, DatasetDict

from formats.errors import UserError
from tests.trainer.chat.llama import said
from tests.trainer.chat.templates import CALLS
from trainer.config import FinetuningDatasetConfig
from trainer.data.chat.examples import Counts, read_examples
from trainer.data.chat.sources import KINDS, Source, splits_of

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:datasets", "ignore::ResourceWarning")

ROWS = [{"id": number, "messages": said("what?", "a fox " * number, *(["and?", "it"] * (number % 2)))} for number in range(1, 9)]


def as_jsonl(path: Path) -> Source:
    """A blank line counts as a line, and is no example."""
    path.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS) + "\n\n")
    return Source(path)


def as_parquet(path: Path) -> Source:
    pq.write_table(pa.Table.from_pylist(ROWS), path.with_suffix(".parquet"), row_group_size=3)
    return Source(path.with_suffix(".parquet"))


def as_folder(path: Path) -> Source:
    (path / "more").mkdir(parents=True)
    pq.write_table(pa.Table.from_pylist(ROWS[:3]), path / "a.parquet")
    as_lines = "".join(json.dumps(row) + "\n" for row in ROWS[3:])
    (path / "more" / "b.jsonl").write_text(as_lines)
    (path / "more" / ".c.jsonl").write_text("{")
    (path / "README.md").write_text("# no example")
    return Source(path)


def as_saved(path: Path) -> Source:
    Dataset.from_list(ROWS).save_to_disk(path, num_shards=2)
    return Source(path)


def as_dictionary(path: Path) -> Source:
    DatasetDict(train=Dataset.from_list(ROWS), test=Dataset.from_list(ROWS[:1])).save_to_disk(path)
    return Source(path, "train")


def as_files_of_splits(path: Path) -> Source:
    path.mkdir()
    for number, rows in enumerate((ROWS[:5], ROWS[5:])):
        pq.write_table(pa.Table.from_pylist(rows), path / f"train-0000{number}-of-00002.parquet")
    pq.write_table(pa.Table.from_pylist(ROWS[:1]), path / "test-00000-of-00001.parquet")
    return Source(path, "train")


MAKERS = [as_jsonl, as_parquet, as_folder, as_saved, as_dictionary, as_files_of_splits]


@pytest.mark.parametrize("make", MAKERS)
def test_all_kinds_give_the_same_examples(make, tmp_path, tokenizer, learn):
    source, counts = make(tmp_path / "made.jsonl"), Counts()
    learned = [
        (example.tokens.tolist(), example.trained.astype(int).tolist())
        for example in read_examples(source, tokenizer, CONFIG, counts=counts)
    ]
    assert learned == learn(*ROWS)
    assert len(counts.files) == (2 if make in (as_folder, as_files_of_splits) else 1)
    assert all(path.is_file() for path in source.files())


CONFIG = FinetuningDatasetConfig()


def calling(**arguments):
    called = {"role": "assistant", "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": arguments}}]}
    return {"messages": [*said("go"), called, {"role": "tool", "content": "ok"}, *said("", "done")[1:]], "tools": None}


CALLING = [
    calling(city="Bern"),
    calling(days=3),
    {"messages": said("hi", "there"), "tools": [{"name": "f", "parameters": {"a": "b"}}]},
]


@pytest.mark.parametrize("make", [as_parquet, as_saved])
def test_what_a_table_fills_in_is_not_there(make, tmp_path, tokenizer, learn, monkeypatch):
    """A column has every field that any row has, at every depth: calls would get each other's arguments."""
    monkeypatch.setattr(f"{__name__}.ROWS", CALLING)
    (tmp_path / "calls.jinja").write_text(CALLS)
    config = FinetuningDatasetConfig(chat_template=str(tmp_path / "calls.jinja"))
    examples = read_examples(make(tmp_path / "made"), tokenizer, config)
    learned = [(example.tokens.tolist(), example.trained.astype(int).tolist()) for example in examples]
    assert learned == learn(*CALLING, chat_template=config.chat_template)
    assert ["days" in tokenizer.decode(tokens) for tokens, _ in learned] == [False, True, False]


@pytest.mark.parametrize(
    ("make", "locations"),
    [
        (as_jsonl, ["`made.jsonl`, line 1", "`made.jsonl`, line 8"]),
        (as_parquet, ["`made.parquet`, row 1", "`made.parquet`, row 8"]),
        (as_folder, ["`made.jsonl/a.parquet`, row 1", "`made.jsonl/more/b.jsonl`, line 5"]),
        (as_saved, ["`made.jsonl`, row 1", "`made.jsonl`, row 8"]),
        (as_dictionary, ["`made.jsonl/train`, row 1", "`made.jsonl/train`, row 8"]),
    ],
)
def test_each_example_knows_its_place(make, locations, tmp_path):
    records = list(make(tmp_path / "made.jsonl").records())
    assert [record.location.replace(f"{tmp_path}/", "") for record in (records[0], records[-1])] == locations
    assert [record.fields()["id"] for record in records] == [row["id"] for row in ROWS]


def test_records_are_read_as_they_are_asked_for(tmp_path):
    """A file of millions of lines is not held: the second line is never looked at."""
    (tmp_path / "a.jsonl").write_bytes(b'{"id": 1}\n' + b"x" * 100)
    records = Source(tmp_path / "a.jsonl").records()
    assert next(records).fields() == {"id": 1}


def test_the_splits_of_a_folder_are_found_by_name(tmp_path):
    as_dictionary(tmp_path / "saved")
    as_files_of_splits(tmp_path / "files")
    as_folder(tmp_path / "plain")
    (tmp_path / "words").mkdir()
    for name in ("training.jsonl", "devices.jsonl"):
        (tmp_path / "words" / name).write_text("{}")
    names = [splits_of(tmp_path / name) for name in ("saved", "files", "plain", "words", "none")]
    assert names == [["train", "test"], ["test", "train"], [], [], []]


def refusal(source: Source, tmp_path: Path) -> str:
    with pytest.raises(UserError) as error:
        list(source.records())
    return str(error.value).replace(f"{tmp_path}/", "")


def test_what_cannot_be_read_is_named(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "a.csv").write_text("a,b")
    (tmp_path / "a.parquet").write_text("no")
    supported = f"\n\nhint: supported are {KINDS}"
    assert refusal(Source(tmp_path / "none"), tmp_path) == f"`none` does not exist\n\nhint: examples are read from {KINDS}"
    assert refusal(Source(tmp_path / "empty"), tmp_path) == f"`empty` is not a supported file or folder of examples{supported}"
    assert refusal(Source(tmp_path / "a.csv"), tmp_path) == f"`a.csv` is not a supported file or folder of examples{supported}"
    assert refusal(Source(tmp_path / "a.parquet"), tmp_path).startswith("`a.parquet` is not readable as parquet")


def test_a_damaged_folder_of_datasets_is_named(tmp_path):
    source = as_saved(tmp_path / "saved")
    next((tmp_path / "saved").glob("*.arrow")).unlink()
    assert refusal(source, tmp_path).startswith("`saved` is not readable as a folder of `datasets`: ")
    as_dictionary(tmp_path / "many")
    (tmp_path / "many" / "dataset_dict.json").write_text('{"splits": ["other"]}')
    with pytest.raises(UserError, match=r"dataset_dict.json` does not list the splits in its folder"):
        splits_of(tmp_path / "many")


def test_without_datasets_its_folders_say_what_to_install(tmp_path, monkeypatch):
    source = as_saved(tmp_path / "saved")
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert refusal(source, tmp_path) == (
        "`saved` was saved by Hugging Face `datasets`, which is not installed\n\n"
        "hint: pip install 'mbtools[datasets]', or save the data as .parquet"
    )
