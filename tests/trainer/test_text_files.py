"""Files of text as they come: byte-order marks, blank lines, other line ends, other encodings, and JSON that is not in lines."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
from pathlib import Path

import pytest

from formats.errors import UserError
from trainer.data import readers
from trainer.data.chat.sources import Source

ONE, TWO = {"text": "grün", "n": [1]}, {"text": "zwei"}
LINES = [json.dumps(row, ensure_ascii=False).encode() for row in (ONE, TWO)]


@pytest.mark.parametrize(
    "data",
    [
        b"\n".join(LINES),
        b"\xef\xbb\xbf" + b"\n".join(LINES) + b"\n",
        b"\xef\xbb\xbf\r\n\r\n" + b"\r\n".join(LINES) + b"\r\n",
        b"\n \n\t\n" + b"\n\n".join(LINES) + b"\n\n",
    ],
    ids=["plain", "mark", "mark, blank lines and CRLF", "blank lines"],
)
def test_lines_are_read_whatever_stands_around_them(data: bytes, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(data)
    assert [readers.document_text(raw, key="text") for raw in readers.read_documents([path], key="text")] == ["grün", "zwei"]
    assert [record.fields() for record in Source(path).records()] == [ONE, TWO]


def test_the_mark_of_a_text_file_is_no_letter_of_it(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfgr\xc3\xbcn")
    assert [readers.document_text(raw, key="text") for raw in readers.read_documents([tmp_path / "a.txt"], key="text")] == [
        "grün"
    ]


ARRAY = (
    "`a.jsonl` is one JSON array; a .jsonl file has one {what} per line\n\nhint: write it so: `jq -c '.[]' a.jsonl > NEW.jsonl`"
)
SPREAD = (
    "`a.jsonl` begins with a JSON object over several lines; a .jsonl file has one {what} per line\n\n"
    "hint: write it so: `jq -c . a.jsonl > NEW.jsonl`"
)
UTF16 = "`a.jsonl` is text in UTF-16, {why}; it should be UTF-8\n\nhint: convert it: `iconv -f UTF-16 -t UTF-8 a.jsonl > NEW`"
PACKED = "`a.jsonl` is compressed with {name}\n\nhint: unpack it first: `{program} a.jsonl`"
TEXT = b"\n".join(LINES)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (json.dumps([ONE, TWO], indent=2).encode(), ARRAY),
        (json.dumps([ONE, TWO]).encode(), ARRAY),
        (b"\xef\xbb\xbf\n" + json.dumps([ONE], indent=1).encode(), ARRAY),
        (b"[]", ARRAY),
        (json.dumps(ONE, indent=2).encode(), SPREAD),
        (TEXT.decode().encode("utf-16"), UTF16.format(why="by its byte-order mark")),
        (json.dumps(TWO).encode("utf-16-le"), UTF16.format(why="judging by its zero bytes")),
        (gzip.compress(TEXT), PACKED.format(name="gzip", program="gunzip")),
        (bz2.compress(TEXT), PACKED.format(name="bzip2", program="bunzip2")),
        (lzma.compress(TEXT), PACKED.format(name="xz", program="unxz")),
    ],
    ids=["array", "array in a line", "array behind a mark", "no array", "object", "utf-16", "no mark", "gz", "bz2", "xz"],
)
def test_what_is_not_in_lines_of_utf8_is_said_as_what_it_is(data: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(data)
    for what, read in (
        ("document", lambda: list(readers.read_documents([path], key="text"))),
        ("example", lambda: list(Source(path).records())),
    ):
        with pytest.raises(UserError) as refused:
            read()
        assert str(refused.value).replace(f"{tmp_path}/", "") == message.replace("{what}", what)


def test_a_bad_line_is_still_named_by_its_number(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    for first in (b'["a", 1]', b'{"text": "open', b'{"text": }'):
        path.write_bytes(first + b"\n" + LINES[1])
        (raw, _) = readers.read_documents([path], key="text")
        with pytest.raises(UserError, match=r"a\.jsonl`, line 1 cannot be read: it is no"):
            readers.document_text(raw, key="text")


@pytest.mark.parametrize(
    ("name", "way"),
    [
        ("a.json", "if it has one JSON object per line, name it `a.jsonl`; if it is one array, `jq -c '.[]'` makes lines; "),
        ("a.jsonl.gz", "unpack it first; "),
        ("a.csv", ""),
    ],
)
def test_a_file_of_another_kind_has_a_way_in(name: str, way: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(TEXT)
    with pytest.raises(UserError) as refused:
        readers.list_inputs([tmp_path / name])
    assert refused.value.hint.startswith(f"{way}inputs are folders or files: ")
    with pytest.raises(UserError) as refused:
        Source(tmp_path / name).files()
    assert refused.value.hint.startswith(f"{way}supported are ")
