"""Names that are not UTF-8: of side files they are refused before a byte moves, of directories they are only names."""

from __future__ import annotations

import json
import os
import re
import shutil

import pytest

from converter import UserError, check, hf_to_mcore, mcore_to_hf
from formats.errors import printable
from tests.models import model_tree

WORDS = """\
the name of `{}` is not UTF-8, so `integrity.json` could not list it

hint: rename the file, or move it out of the directory"""


def refused(act, *arguments, name, **options):
    with pytest.raises(UserError, match=f"^{re.escape(WORDS.format(name))}$"):
        act(*arguments, **options)


@pytest.mark.parametrize("options", [{}, {"integrity": False}, {"dry_run": True}])
@pytest.mark.parametrize(("name", "words"), [(b"caf\xe9.txt", r"caf\xe9.txt"), (b"a/\xff\xfe/b", r"a/\xff\xfe/b")])
def test_a_side_file_is_refused_by_its_escaped_name(source, tmp_path, name, words, options):
    path = os.fsencode(source) + b"/" + name
    os.makedirs(os.path.dirname(path), exist_ok=True)  # noqa: PTH103, PTH120 - bytes
    with open(path, "wb"):  # noqa: PTH123
        pass
    refused(hf_to_mcore, source, tmp_path / "m", name=words, **options)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_a_weights_file_is_refused_likewise(source, tmp_path):
    (source / "model.safetensors.index.json").unlink()
    for number, shard in enumerate(sorted(source.glob("*.safetensors"))):  # without an index, numbers would say which are missing
        shard.rename(source / (f"part-{number}.safetensors" if number else os.fsdecode(b"model\xff.safetensors")))
    refused(hf_to_mcore, source, tmp_path / "m", name=r"model\xff.safetensors")


def test_a_file_that_a_checkpoint_carries_is_refused_likewise(checkpoint, tmp_path):
    (checkpoint / "iter_0000000/huggingface/files" / os.fsdecode(b"\xff")).touch()
    refused(mcore_to_hf, checkpoint, tmp_path / "back", name=r"\xff")


def test_a_directory_may_have_any_name(source, tmp_path):
    named = tmp_path / os.fsdecode(b"t\xffy")
    shutil.move(source, named)
    hf_to_mcore(named, tmp_path / "m")
    record = (tmp_path / "m" / "iter_0000000" / "conversion.json").read_text()
    assert json.loads(record)["source"]["name"] == r"t\xffy"
    mcore_to_hf(tmp_path / "m", tmp_path / os.fsdecode(b"\xfe"))
    assert check(tmp_path / os.fsdecode(b"\xfe")).whole
    assert model_tree(tmp_path / os.fsdecode(b"\xfe")) == model_tree(named)


@pytest.mark.parametrize(("name", "words"), [("naïve", "naïve"), ("a\udcffb", r"a\xffb"), ("\ud800", r"\ud800")])
def test_what_is_not_utf8_is_shown_with_escapes(name, words):
    assert printable(name) == words
