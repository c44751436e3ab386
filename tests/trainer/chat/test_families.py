"""Which tokens are learned with the chat templates of published families: as written by hand in `families`."""

from __future__ import annotations

import datetime
import json
import re
from dataclasses import replace
from itertools import groupby, pairwise

import pytest
from click.testing import CliRunner
from transformers import AutoTokenizer
from transformers.utils.chat_template_utils import render_jinja_template

from tests.trainer.chat import family as families
from trainer import tokenizers
from trainer.cli import main
from trainer.data.chat.fields import ANSWER_ROLES
from trainer.generation.text import encode_text

CASES = [(name, title) for name in families.NAMES for title in families.load(name)[1]]
LEARNED = [(name, title) for name, title in CASES if families.load(name)[1][title].expected]
DAY = datetime.date(2024, 7, 26)


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory):
    """The folder of a family's tokenizer and template."""
    root = tmp_path_factory.mktemp("families")
    return lambda name: root / name if (root / name).exists() else families.save(root / name, name, families.load(name)[0])


@pytest.fixture
def examples_of(learn, folder_of):
    """The examples of a case, as (tokens, trained)."""

    def read(name, title, **settings):
        case = families.load(name)[1][title]
        return learn(case.example, tokenizer=tokenizers.load(str(folder_of(name))), learn=case.learn, **settings)

    return read


def written(text, tokenizer):
    """The tokens of an expected text, piece by piece, and which are learned."""
    pieces = [(tokenizer.encode(piece), learned) for piece, learned in families.split_learned(text)]
    return [token for ids, _ in pieces for token in ids], [int(learned) for ids, learned in pieces for _ in ids]


@pytest.mark.parametrize(("name", "title"), LEARNED)
def test_the_written_tokens_are_learned_and_no_others(examples_of, folder_of, name, title):
    tokenizer = tokenizers.load(str(folder_of(name)))
    assert examples_of(name, title) == [written(text, tokenizer) for text in families.load(name)[1][title].expected]


@pytest.mark.parametrize(("name", "title"), [case for case in CASES if case not in LEARNED])
def test_what_the_template_would_drop_or_change_is_refused_by_name(refusal, folder_of, name, title):
    case = families.load(name)[1][title]
    message = refusal(case.example, tokenizer=tokenizers.load(str(folder_of(name))), learn=case.learn)
    assert message.startswith("`a.jsonl`, line 1 cannot be used: " + case.refused)


def prompts(folder, family, example):
    """The text that transformers renders to ask for each answer."""
    renderer, tools = AutoTokenizer.from_pretrained(folder), example.get("tools")
    messages = [as_openai_has_it(message) if family.openai_calls else message for message in example["messages"]]
    template = re.sub(
        r"strftime_now\('(.*?)'\)", lambda form: repr(DAY.strftime(form[1])), renderer.get_chat_template(tools=tools)
    )
    options = {**renderer.special_tokens_map, **example.get("chat_template_kwargs", {}), "add_generation_prompt": True}
    answers = [number for number, message in enumerate(messages) if message["role"] in ANSWER_ROLES]
    before = [messages[:number] for number in answers]
    return render_jinja_template(before, tools=tools, chat_template=template, **options)[0]


def as_openai_has_it(message):
    """The message with the arguments of its calls as JSON."""
    if "tool_calls" not in message:
        return message
    functions = [call["function"] for call in message["tool_calls"]]
    texts = [{**function, "arguments": json.dumps(function["arguments"])} for function in functions]
    return {**message, "tool_calls": [{"type": "function", "function": function} for function in texts]}


@pytest.mark.parametrize(("name", "title"), LEARNED)
def test_each_answer_follows_the_tokens_that_its_rendered_prompt_has_in_generation(examples_of, folder_of, name, title):
    tokenizer, (family, cases) = tokenizers.load(str(folder_of(name))), families.load(name)
    asked = [encode_text(text, tokenizer) for text in prompts(folder_of(name), family, cases[title].example)]
    begun = []
    for tokens, trained in examples_of(name, title):
        begins = [0, *(position for position, (before, now) in enumerate(pairwise(trained), 1) if now > before)][1:]
        begun += [tokens[:begin] for begin in begins]
    assert begun == asked[-len(begun) :]


@pytest.mark.parametrize(("name", "title"), LEARNED)
def test_an_answer_ends_with_a_token_at_which_the_model_stops(examples_of, folder_of, name, title):
    tokenizer, family = tokenizers.load(str(folder_of(name))), families.load(name)[0]
    for tokens, trained in examples_of(name, title):
        runs = [list(run) for on, run in groupby(zip(tokens, trained, strict=True), key=lambda pair: pair[1]) if on]
        ends = {tokenizer.decode([run[-1][0]]) for run in runs}
        assert ends <= {family.eos, *family.stops, *ENDS.get(name, ())}


ENDS = {
    "gemma2": ["<end_of_turn>"],
    "gemma3": ["<end_of_turn>"],
    "phi3_5": ["<|end|>"],
    "phi4_mini": ["<|end|>"],
    "ernie4_5": ["<|end_of_sentence|>"],
}
"""Tokens at which a model stops beside its tokenizer's end token, where the family's file does not say so."""


@pytest.mark.parametrize(("name", "title"), dict(reversed(LEARNED)).items())
def test_preview_shows_what_is_written(folder_of, tmp_path, name, title):
    case = families.load(name)[1][title]
    (tmp_path / "a.jsonl").write_text(json.dumps(case.example))
    words = [
        f"dataset.path={tmp_path / 'a.jsonl'}",
        f"tokenizer.tokenizer_model={folder_of(name)}",
        f"dataset.learn={case.learn}",
    ]
    shown = CliRunner().invoke(main, ["preview", "llama_tiny", *words], catch_exceptions=False).stdout
    decode = tokenizers.load(str(folder_of(name)))
    for text in case.expected:
        pieces = [(decode.decode(decode.encode(piece)), learned) for piece, learned in families.split_learned(text)]
        assert "".join(f"⟦{piece}⟧" if learned else piece for piece, learned in pieces).replace("\n", "↵\n") in shown


def test_without_the_model_s_end_tokens_the_token_of_the_next_role_is_not_taken_for_an_end(refusal, tmp_path):
    family, cases = families.load("glm4")
    bare = tokenizers.load(str(families.save(tmp_path / "glm4", "glm4", replace(family, stops=()))))
    assert refusal(cases["two turns"].example, tokenizer=bare).split(", or leave such")[0] == (
        "`a.jsonl`, line 1 cannot be used: the chat template does not end the assistant's turn with a special token: "
        "after message 3 follows `<|user|>`\n\n"
        "hint: if the model stops at `<|user|>`, add it to `eos_token_id` in `generation_config.json` beside the tokenizer; "
        "otherwise mark the answers in the template with `{% generation %}` and `{% endgeneration %}`: "
        "`dataset.chat_template=FILE`"
    )
