"""`mbtrain preview`, as a user calls it."""

from __future__ import annotations

import json
import sys
from functools import partial

import click
import numpy as np
import pytest
from click.testing import CliRunner

from tests.trainer.chat.llama import said
from trainer import tokenizers
from trainer.cli import main
from trainer.data.chat.preview import brackets, example_text, histogram
from trainer.data.chat.tokenized import Tokenized


def preview(*words):
    return CliRunner().invoke(main, ["preview", *(str(word) for word in words)], catch_exceptions=False)


@pytest.fixture
def pairs(tmp_path):
    """Ten prompts and completions, the longest of 24 bytes, and a line that is none."""
    path = tmp_path / "a.jsonl"
    rows = [{"prompt": "a\n" + "x" * number, "completion": "y" * number + "\x1b[31m"} for number in range(1, 10)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"prompt": "a"}\n')
    return path


def test_examples_and_figures_of_prompts_and_completions(pairs):
    result = preview("llama_tiny", f"dataset.path={pairs}", "dataset.sequence_length=16", "--examples", 2, "--skip-bad")
    assert result.exit_code == 0, result.stderr
    assert result.stdout.splitlines() == [
        f"# `{pairs}`, line 1: 10 tokens, 7 trained on",
        "a↵",
        "x⟦y\\x1b[31m<|endoftext|>⟧",
        "",
        f"# `{pairs}`, line 2: 12 tokens, 8 trained on",
        "a↵",
        "xx⟦yy\\x1b[31m<|endoftext|>⟧",
        "",
        "9 examples of 1 file: 132 tokens, 52.3 % trained on, 5 truncated to 16, 1 skipped",
        "skipped 1: it has neither `messages` nor `completion`",
        "unpacked, with one example per sequence, 91.7 % of 16 tokens would be filled",
        "tokens per example:",
        "  1-2   0",
        "  3-4   0",
        "  5-6   0",
        "  7-8   0",
        " 9-10  ███████ 1",
        "11-12  ███████ 1",
        "13-14  ███████ 1",
        "15-16  ████████████████████████████████████████ 6",
    ]


def test_a_bad_example_stops_it_unless_it_is_skipped(pairs):
    result = preview("llama_tiny", f"dataset.path={pairs}")
    assert result.exit_code == 1
    assert result.stdout.count("# `") == 3
    assert result.stderr == (
        f"error: `{pairs}`, line 10 cannot be used: it has neither `messages` nor `completion`: it has `prompt`\n\n"
        "hint: correct it, or leave such examples out: `dataset.skip_bad=true`\n"
    )


def test_the_figures_may_be_those_of_the_first(pairs):
    result = preview("llama_tiny", f"dataset.path={pairs}", "--limit", 4, "--examples", 0)
    assert result.stdout.startswith("the first 4 examples of 1 file: 52 tokens, ")


def test_conversations_of_a_recipe_with_another_tokenizer(tmp_path, folder):
    (tmp_path / "a.jsonl").write_text(json.dumps({"messages": said("what?", "a fox", "and?", "it")}))
    words = [f"dataset.path={tmp_path / 'a.jsonl'}", f"tokenizer.tokenizer_model={folder}"]
    head, end = "<|start_header_id|>{}<|end_header_id|>↵\n↵\n".format, "<|eot_id|>"
    user, assistant = head("user"), head("assistant")
    whole = f"<|begin_of_text|>{user}what?{end}{assistant}⟦a fox{end}⟧{user}and?{end}{assistant}⟦it{end}⟧"
    assert whole in preview("llama_tiny", *words).stdout
    tokenizer = tokenizers.load(str(folder))
    pieces = [tokenizer.decode([token]) for token in tokenizer.encode("a fox")]
    assert len(pieces) > 1
    assert f"⟦{'|'.join(pieces)}|{end}⟧" in preview("llama_tiny", *words, "--tokens").stdout


def test_the_tokenizer_of_the_weights_to_start_from_is_taken(tmp_path, folder):
    (tmp_path / "a.jsonl").write_text(json.dumps({"messages": said("what?", "a fox")}))
    words = [f"dataset.path={tmp_path / 'a.jsonl'}", "~tokenizer.tokenizer_model"]
    result = preview("llama_tiny", *words, f"checkpoint.pretrained_checkpoint={folder}")
    assert "⟦a fox<|eot_id|>⟧" in result.stdout
    result = preview("llama_tiny", *words)
    assert result.stderr == (
        "error: the examples need a tokenizer, and none is set\n\n"
        "hint: name a folder with `tokenizer.json`: `tokenizer.tokenizer_model=DIR`\n"
    )


def test_each_split_can_be_seen(tmp_path, pairs):
    (tmp_path / "v.jsonl").write_text('{"prompt": "v", "completion": "w"}')
    words = ["llama_tiny", f"dataset.path={pairs}", f"dataset.validation_path={tmp_path / 'v.jsonl'}", "--split"]
    assert "v⟦w<|endoftext|>⟧" in preview(*words, "validation").stdout
    assert preview(*words, "test").stderr == (
        "error: there are no examples for test\n\nhint: set `dataset.test_path`, or its share in `dataset.split`\n"
    )


def test_a_setting_of_documents_is_none_of_examples(pairs):
    result = preview("llama_tiny", f"dataset.path={pairs}", "dataset.blend_per_split=[[a]]")
    assert result.stderr.startswith("error: unknown setting `dataset.blend_per_split`")


def test_each_source_of_a_split_is_shown(pairs, tmp_path):
    other = tmp_path / "b.jsonl"
    other.write_text('{"prompt": "another", "completion": "one"}\n')
    words = ("llama_tiny", f"dataset.blend=[{pairs},{other}]", "dataset.split='1,0,0'", "--examples", 1, "--skip-bad")
    result = preview(*words)
    assert result.exit_code == 0, result.stderr
    assert [line for line in result.stdout.splitlines() if line.startswith("# ")] == [
        f"# `{pairs}`, line 1: 10 tokens, 7 trained on",
        f"# `{other}`, line 1: 11 tokens, 4 trained on",
    ]


@pytest.mark.parametrize(("terminal", "no_color", "colored"), [(True, "", True), (True, "1", False), (False, "", False)])
def test_colors_are_for_terminals_that_want_them(monkeypatch, terminal, no_color, colored):
    from trainer.commands.preview import _highlight

    monkeypatch.setattr(sys.stdout, "isatty", lambda: terminal, raising=False)
    monkeypatch.setenv("NO_COLOR", no_color)
    assert _highlight()("a") == (click.style("a", fg="green", bold=True) if colored else "⟦a⟧")


def test_characters_of_several_tokens_stay_whole():
    byte = tokenizers.load("byte")
    tokens = byte.encode("aü🙂b")
    example = Tokenized(np.array(tokens, np.int32), np.arange(len(tokens)) >= 3)
    assert example_text(example, byte, highlight=brackets) == "aü⟦🙂b⟧"
    assert example_text(example, byte, highlight=brackets, separator="|") == "a|ü⟦🙂|b⟧"
    assert example_text(example, byte, highlight=partial(click.style, fg="red")) == "aü\x1b[31m🙂b\x1b[0m"


def test_every_length_is_in_one_bar():
    lengths = [1, 1, 2, 3, 500, 1000]
    bars = histogram(lengths)
    assert sum(int(bar.split()[-1]) for bar in bars) == len(lengths)
    assert (len(bars), bars[0], bars[-1]) == (8, f"    1-125  {'█' * 40} 4", f"876-1,000  {'█' * 10} 1")
    assert histogram([1, 2, 2]) == ["1  ████████████████████ 1", "2  ████████████████████████████████████████ 2"]
