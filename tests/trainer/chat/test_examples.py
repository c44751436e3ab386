"""From files to tokens: what is counted, cut and refused."""

from __future__ import annotations

from dataclasses import replace

import pytest

from trainer import tokenizers
from trainer.config import FinetuningDatasetConfig
from trainer.data.chat import examples
from trainer.data.chat.examples import Counts, identity
from trainer.data.chat.sources import Source

BYTE = tokenizers.load("byte")
SKIP = "hint: correct it, or leave such examples out: `dataset.skip_bad=true`"


def pair(prompt, completion):
    return {"prompt": prompt, "completion": completion}


def test_what_was_read_is_told_in_a_line(learn):
    counts = Counts()
    lines = [pair("a", "b")] * 3 + ["{", "[]", '{"prompt": "a"}', pair("a" * 8, "b"), pair("a", "b" * 9), "{"]
    examples = learn(*lines, tokenizer=BYTE, counts=counts, sequence_length=8, skip_bad=True)
    assert [len(tokens) for tokens, _ in examples] == [3, 3, 3, 8]
    assert examples[3] == ([97] + [98] * 7, [0] + [1] * 7)
    assert (counts.examples, counts.tokens, counts.trained, counts.truncated, counts.longest) == (4, 17, 13, 1, 11)
    assert str(counts) == "4 examples of 1 file: 17 tokens, 76.5 % trained on, 1 truncated to 8, 5 skipped"
    assert counts.reasons() == [
        "skipped 2: it is not JSON",
        "skipped 1: it is not a JSON object",
        "skipped 1: it has neither `messages` nor `completion`",
        "skipped 1: the answer is truncated away entirely",
    ]


def test_large_numbers_are_told_short(tmp_path):
    files = {tmp_path / name for name in "abc"}
    counts = Counts(sequence_length=2048, examples=12345, tokens=4_100_000, trained=1_566_200, truncated=17, files=files)
    counts.skipped["no"] = 3
    summary = "12,345 examples of 3 files: 4.1 M tokens, 38.2 % trained on, 17 truncated to 2048, 3 skipped"
    assert str(counts) == summary


def test_an_answer_that_is_cut_away_whole_is_refused(refusal, learn):
    assert refusal(pair("abc", "d"), tokenizer=BYTE, sequence_length=3) == (
        "`a.jsonl`, line 1 cannot be used: the answer is truncated away entirely: it begins at token 4, a sequence has 3"
        f"\n\n{SKIP}"
    )
    assert learn(pair("abc", "d"), tokenizer=BYTE, sequence_length=4) == [([97, 98, 99, 100], [0, 0, 0, 1])]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("{", "it is not JSON: the fault is at line 2, column 1"),
        ("[1]", "it is not a JSON object: it is [1]"),
    ],
)
def test_a_line_that_is_no_json_object_is_named(refusal, line, reason):
    good = pair("a", "b")
    assert refusal(good, "", line, good, tokenizer=BYTE) == f"`a.jsonl`, line 3 cannot be used: {reason}\n\n{SKIP}"


def test_bytes_that_are_no_text_are_named(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'{"prompt": "\xff"}')
    with pytest.raises(examples.UserError, match=r"line 1 cannot be used: it is not UTF-8: byte 12 is not UTF-8"):
        list(examples.read_examples(Source(tmp_path / "a.jsonl"), BYTE, FinetuningDatasetConfig()))


def test_the_first_example_that_is_bad_is_told_whenever_it_is_found_out(refusal):
    """That nothing asks for an answer shows in the tokens, that a line is no JSON before there are any."""
    assert refusal(pair("a", "b"), pair("", "b"), "{", tokenizer=BYTE).startswith("`a.jsonl`, line 2 ")


def test_examples_none_of_which_is_good_are_an_error_whatever_is_skipped(refusal):
    lines = ["{", pair("", "b"), pair("", "b")]
    assert refusal(*lines, tokenizer=BYTE, skip_bad=True) == (
        "no example of `a.jsonl` can be used "
        "(2: all of its tokens are learned: it has no prompt; 1: it is not JSON)\n\n"
        "hint: look at one with `mbtrain preview`"
    )
    assert refusal("", tokenizer=BYTE, skip_bad=True).startswith("`a.jsonl` has no examples\n\n")


def test_tokens_do_not_depend_on_how_many_are_made_at_a_time(learn, monkeypatch):
    lines = [pair("a" * (1 + n % 7), "the fox " * (n % 5 + 1)) for n in range(20)]
    together = learn(*lines)
    monkeypatch.setattr(examples, "_BATCH", 3)
    assert learn(*lines) == together
    assert len(together) == 20


def test_the_identity_changes_with_whatever_the_tokens_depend_on(tmp_path, folder):
    path, jinja = tmp_path / "a.jsonl", tmp_path / "a.jinja"
    path.write_text("{}")
    jinja.write_text("one")
    config, source = FinetuningDatasetConfig(chat_template=str(jinja)), Source(path)
    seen = [identity(source, BYTE, config), identity(source, tokenizers.load(str(folder)), config)]
    seen += [
        identity(source, BYTE, replace(config, **changes))
        for changes in ({"sequence_length": 9}, {"prompt_template": "{prompt}:"})
    ]
    jinja.write_text("two")
    seen.append(identity(source, BYTE, config))
    path.write_text("{} ")
    seen.append(identity(source, BYTE, config))
    assert all(name not in seen[:number] for number, name in enumerate(seen))
    assert identity(source, BYTE, replace(config, packed=False, num_workers=9)) == seen[-1]
