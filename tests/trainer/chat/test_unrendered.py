"""What a template does not show of an example is refused by name, whatever the field is called; what it shows is learned."""

from __future__ import annotations

import json

import pytest
from transformers import AutoTokenizer

from tests.trainer.chat.llama import PLAIN, said
from tests.trainer.chat.templates import CALLS, ONE_CALL, THINKING
from trainer.data.chat.examples import Counts

REFUSED = "`a.jsonl`, line 1 cannot be used: "
OUT = "the chat template does not render all content: "
TOOLS = [{"type": "function", "function": {"name": "weather", "description": "Tell it.", "parameters": {"type": "object"}}}]


def call(name="weather", **arguments):
    return {"id": "call_1", "type": "function", "function": {"name": name, "arguments": arguments}}


ANSWER = {"role": "assistant", "content": "It rains."}
HEARD = {"role": "tool", "tool_call_id": "call_1", "name": "weather", "content": "rain"}


def used(*calls, **more):
    """A question, calls of tools, what they said, and an answer."""
    asked = {"role": "assistant", "tool_calls": list(calls), **more}
    return [*said("What is the weather in Bern?"), asked, HEARD, ANSWER]


def whole(folder, messages, template, **further):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return tokenizer.apply_chat_template(messages, chat_template=template, return_dict=True, **further)["input_ids"]


@pytest.mark.parametrize("text", [CALLS, ONE_CALL], ids=["calls", "one call"])
def test_calls_and_tools_are_learned_as_transformers_renders_them(learn, template, folder, tokenizer, text):
    messages = used(call(city="Bern", days=2))
    ((tokens, trained),) = learn({"messages": messages, "tools": TOOLS}, chat_template=template(text))
    assert tokens == whole(folder, messages, text, tools=TOOLS)
    learned = tokenizer.decode([token for token, on in zip(tokens, trained, strict=True) if on])
    assert '"weather"' in learned
    assert '{"city": "Bern", "days": 2}' in learned
    assert "rain" in learned.replace("It rains", "rain")
    assert "<tool_response>" not in learned


@pytest.mark.parametrize("text", [CALLS, ONE_CALL], ids=["calls", "one call"])
def test_arguments_and_calls_that_are_json_are_the_same_objects(learn, template, text):
    """OpenAI writes arguments as JSON; a template that writes JSON of them would quote them twice."""
    as_object = call(city="Bern")
    as_json = {**as_object, "function": {"name": "weather", "arguments": json.dumps({"city": "Bern"})}}
    forms = [used(as_object), used(as_json)]
    whole_as_json = used(as_object)
    whole_as_json[1] = {**whole_as_json[1], "tool_calls": json.dumps([as_object])}
    learned = learn(*({"messages": form} for form in [*forms, whole_as_json]), chat_template=template(text))
    assert learned[0] == learned[1] == learned[2]


@pytest.mark.parametrize("call_without", [{}, {"content": None}], ids=["absent", "null"])
def test_a_call_without_a_text_has_an_empty_one_where_the_template_asks_for_texts(learn, template, folder, call_without):
    text = CALLS.replace("{%- set content = m.content or '' %}", "{%- set content = m.content + '' %}")
    messages = used(call(city="Bern"), **call_without)
    ((tokens, _),) = learn({"messages": messages}, chat_template=template(text))
    assert tokens == whole(folder, used(call(city="Bern"), content=""), text)


def test_sharegpt_calls_tools_too(learn, template):
    inside = {"name": "weather", "arguments": {"city": "Bern"}}
    turns = [("human", "Weather?"), ("function_call", json.dumps(inside)), ("observation", "rain"), ("gpt", "It rains.")]
    conversation = {"conversations": [{"from": who, "value": text} for who, text in turns], "tools": json.dumps(TOOLS)}
    expected = [*said("Weather?"), {"role": "assistant", "tool_calls": [inside]}, {"role": "tool", "content": "rain"}, ANSWER]
    text = template(CALLS)
    assert learn(conversation, chat_template=text) == learn({"messages": expected, "tools": TOOLS}, chat_template=text)


HI = said("hello there", "general")


def beside(number, **more):
    return {"messages": [{**message, **more} if position == number else message for position, message in enumerate(HI)]}


@pytest.mark.parametrize(
    ("text", "example", "lost"),
    [
        (PLAIN, {"messages": HI, "tools": TOOLS}, "its `tools`"),
        (PLAIN, beside(1, thoughts="because of it"), "message 2, its `thoughts`"),
        (PLAIN, beside(1, reasoning="yes"), "message 2, its `reasoning`"),
        (PLAIN, beside(1, reasoning_content="general"), "message 2, its `reasoning_content`"),
        (PLAIN, beside(0, name="Obi-Wan"), "message 1, its `name`"),
        (PLAIN, beside(0, name="general"), "message 1, its `name`"),
        (PLAIN, beside(1, annotations=[{"note": 1}]), "message 2, its `annotations`"),
        (PLAIN, beside(1, hidden=False), "message 2, its `hidden`"),
        (PLAIN, beside(1, prefix=True), "message 2, its `prefix`"),
        (PLAIN, beside(1, tool_calls=[call(city="Bern")]), "message 2, its `tool_calls`"),
        (ONE_CALL, {"messages": used(call(city="Bern"), content="Let me look.")}, "message 2, of `assistant`"),
        (ONE_CALL, {"messages": used(call(city="Bern"), content="no")}, "message 2, of `assistant`"),
        (PLAIN.replace("message.content }}", "message.content.split('|')[0] }}"),
         {"messages": said("one | two", "three")}, "message 1, of `user`"),
        (PLAIN.replace("message.content }}", "message.content[:60] }}"),
         {"messages": said("what?", "the answer is " * 20)}, "message 2, of `assistant`"),
        (PLAIN.replace("in messages %}", "in messages if message.role != 'critic' %}"),
         {"messages": [*HI[:1], {"role": "critic", "content": "general"}, *HI[1:]]}, "message 2, of `critic`"),
        (THINKING.replace("{% for tool in tools %}", "{% for tool in tools[:1] %}"),
         {"messages": HI, "tools": [*TOOLS, {"name": "clock"}]}, "its `tools`"),
        (CALLS.replace("m.tool_calls or []", "(m.tool_calls or [])[:1]"),
         {"messages": used(call(city="Bern"), call(city="Genf"))}, "message 2, its `tool_calls`"),
        (CALLS.replace("{{ call.arguments | tojson }}", "…"), {"messages": used(call(city="Bern"))},
         "message 2, its `tool_calls`"),
    ],
)  # fmt: skip
def test_what_the_template_does_not_show_is_refused_by_name(refusal, template, text, example, lost):
    assert refusal(example, chat_template=template(text)).split("\n\n")[0] == REFUSED + OUT + lost


@pytest.mark.parametrize(
    "field",
    ["system_prompt", "enable_thinking", "instruction", "documents", "image_paths", "thinking", "loss_mask", "label", "task"],
)
def test_a_field_of_an_example_that_nothing_uses_is_refused_by_name_or_ignored_by_name(refusal, learn, field):
    example = {"messages": HI, field: False if field in ("enable_thinking", "label") else ["a text"]}
    assert refusal(example) == (
        REFUSED + f"its `{field}` would be lost\n\nhint: put it into a message, or leave it out: "
        f"`dataset.ignore_fields=[{field}]`, or leave such examples out: `dataset.skip_bad=true`"
    )
    assert learn(example, ignore_fields=[field]) == learn({"messages": HI})


def test_a_field_of_a_message_is_ignored_by_name(learn, refusal):
    assert refusal(beside(1, reasoning="yes")).split("\n\n")[1] == (
        "hint: use a template that renders it (`dataset.chat_template=FILE`), or remove it from the example: "
        "`dataset.ignore_fields=[reasoning]`, or leave such examples out: `dataset.skip_bad=true`"
    )
    assert learn(beside(1, reasoning="yes"), ignore_fields=["reasoning"]) == learn({"messages": HI})


def test_what_is_about_an_example_or_a_message_is_named_once(learn):
    counts = Counts()
    example = {**beside(1, id="m2", created_at=5, tool_calls=None, refusal="", audio={"id": None}), "prompt_id": "x", "n": None}
    assert learn({**example, "num_turns": 2, "score": 0.5, "docs": []}, counts=counts) == learn({"messages": HI})
    assert counts.reasons() == ["unused fields: `prompt_id`, `num_turns`, `score`, `docs`, `id`, `created_at`"]


def test_a_part_that_is_more_than_text_is_refused(refusal, learn):
    part = {"type": "text", "text": "hello there"}
    assert refusal(beside(0, content=[{**part, "citations": ["a"]}])).startswith(
        REFUSED + "a part of a message has more than text: `citations` in message 1\n"
    )
    assert learn(beside(0, content=[{**part, "image_url": None}])) == learn({"messages": HI})


def test_variables_of_the_template_are_what_the_example_says(refusal, learn, template, folder):
    text = "{% if loud %}LOUD{% endif %}" + PLAIN
    example = {"messages": HI, "chat_template_kwargs": {"loud": True}}
    ((tokens, _),) = learn(example, chat_template=template(text))
    assert tokens == whole(folder, HI, text, loud=True) != whole(folder, HI, text)
    assert refusal(example).split("\n\n")[0] == (
        REFUSED + "the chat template has no variable `loud`, which its `chat_template_kwargs` set"
    )
    example["chat_template_kwargs"] = {"add_generation_prompt": True}
    assert refusal(example).split("\n\n")[0] == (
        REFUSED + "its `chat_template_kwargs` set `add_generation_prompt`, which is reserved"
    )


def test_thoughts_stand_once_under_two_names(learn, template):
    text = template(THINKING)
    once = learn(beside(1, reasoning_content="because"), chat_template=text)
    assert learn(beside(1, reasoning_content="because", reasoning="because"), chat_template=text) == once
    assert learn(beside(1, reasoning="because", reasoning_content="because"), chat_template=text) == once
    assert learn(beside(1, thinking="because"), chat_template=text) == once
    assert learn(beside(1, content="<think>because</think>\n\ngeneral"), chat_template=text) == once
