"""Prompts and completions: the tokens are counted by hand."""

from __future__ import annotations

import pytest

from tests.trainer.chat.llama import BEGIN, END
from trainer import tokenizers

BYTE = tokenizers.load("byte")


def test_prompt_completion_and_the_end_of_text_are_these_bytes(learn):
    [example] = learn({"prompt": "ab", "completion": "cü"}, tokenizer=BYTE)
    assert example == ([97, 98, 99, 195, 188, 256], [0, 0, 1, 1, 1, 1])


def test_the_prompt_has_the_tokens_that_generation_gives_it(learn, tokenizer):
    """Together they would be other tokens: `fo` and `x` make `fox`. What begins every text stands there once."""
    assert tokenizer.encode("the fo") + tokenizer.encode("x") != tokenizer.encode("the fox")
    [(tokens, trained)] = learn({"prompt": "the fo", "completion": "x"})
    assert tokens == [BEGIN, *tokenizer.encode("the fo"), *tokenizer.encode("x"), END]
    assert trained == [0] * (len(tokens) - 2) + [1, 1]


def test_the_template_takes_any_field_of_the_example(learn):
    example = {"prompt": "a", "input": "", "completion": "c", "id": 7}
    [(tokens, trained)] = learn(example, tokenizer=BYTE, prompt_template="{{Q}} {prompt}\n{input}:")
    assert BYTE.decode(tokens) == "{Q} a\n:c<|endoftext|>"
    assert sum(trained) == 2


HINT = "it is text with field names in braces, such as `Question: {prompt}`; a literal brace is doubled: `{{`"


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{prompt", "`dataset.prompt_template` is not readable: it has an unmatched brace"),
        ("{prompt.__class__}", "`dataset.prompt_template` has `{prompt.__class__}`, which is not a plain field name"),
        ("{prompt!r}", "`dataset.prompt_template` has `{prompt}`, which is not a plain field name"),
        ("{}", "`dataset.prompt_template` has `{}`, which is not a plain field name"),
        ("{prompt}{completion}", "`dataset.prompt_template` has `{completion}`, which is the answer"),
        ("Question", "`dataset.prompt_template` has no field of the examples"),
    ],
)
def test_a_template_that_cannot_be_filled_in_is_named_whatever_is_skipped(refusal, template, message):
    example = {"prompt": "a", "completion": "b"}
    assert refusal(example, tokenizer=BYTE, prompt_template=template, skip_bad=True) == f"{message}\n\nhint: {HINT}"


@pytest.mark.parametrize(
    ("example", "reason"),
    [
        ({"completion": "a"}, "it has no `prompt`: it has `completion`"),
        ({"prompt": "a", "text": "b"}, "it has neither `messages` nor `completion`: it has `prompt`, `text`"),
        ({"prompt": "a", "completion": ""}, "its `completion` is empty"),
        ({"prompt": "a", "completion": None}, "it has neither `messages` nor `completion`: it has `prompt`"),
        ({"prompt": 1, "completion": "b"}, "its `prompt` is not text: it is a int"),
        ({"prompt": "a", "completion": "\udc00"}, "its `completion` contains an unpaired surrogate, which is not valid text"),
        ({"prompt": "", "completion": "b"}, "all of its tokens are learned: it has no prompt"),
    ],
)
def test_what_is_no_prompt_and_completion_is_named(refusal, example, reason):
    assert refusal(example, tokenizer=BYTE) == (
        f"`a.jsonl`, line 1 cannot be used: {reason}\n\nhint: correct it, or leave such examples out: `dataset.skip_bad=true`"
    )
