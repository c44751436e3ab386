"""What an example says outside of its texts is learned as it says, or the example is refused; the rest is named."""

from __future__ import annotations

import json

import pytest

from tests.trainer.chat.llama import MARKED, PLAIN, said
from trainer import tokenizers
from trainer.data.chat.examples import Counts

BYTE = tokenizers.load("byte")
REFUSED = "`a.jsonl`, line 1 cannot be used: "
TALK = said("a question", "BAD answer", "another one", "GOOD answer")


def texts(tokenizer, examples):
    """The whole of each example, and what of it is learned."""
    return [
        (tokenizer.decode(ids), tokenizer.decode([token for token, learned in zip(ids, mask, strict=True) if learned]))
        for ids, mask in examples
    ]


def answers(no: dict, yes: dict) -> dict:
    return {"messages": [TALK[0], {**TALK[1], **no}, TALK[2], {**TALK[3], **yes}]}


@pytest.mark.parametrize(
    "says",
    [({"weight": 0}, {"weight": 1}), ({"loss": False}, {"loss": True}), ({"train": False}, {}), ({"masked": True}, {}),
     ({"loss_mask": 0}, {"loss_mask": 1}), ({"weight": 0.0}, {})],
    ids=["weight", "loss", "train", "masked", "loss_mask", "float"],
)  # fmt: skip
@pytest.mark.parametrize("text", [PLAIN, MARKED], ids=["plain", "marked"])
def test_an_answer_that_is_not_to_be_learned_is_shown_and_not_learned(learn, tokenizer, template, says, text):
    ((whole, learned),) = texts(tokenizer, learn(answers(*says), chat_template=template(text)))
    assert "BAD answer" in whole
    assert learned == "GOOD answer<|eot_id|>"


def test_sharegpt_and_a_prompt_of_messages_say_it_too(learn, tokenizer):
    turns = [("human", "a question", {}), ("gpt", "BAD answer", {"weight": 0}), ("human", "q", {}), ("gpt", "GOOD answer", {})]
    sharegpt = {"conversations": [{"from": who, "value": text, **more} for who, text, more in turns]}
    trl = {"prompt": TALK[:1], "completion": [{**TALK[1], "weight": 0}, TALK[2], TALK[3]]}
    for example in (sharegpt, trl):
        ((_, learned),) = texts(tokenizer, learn(example))
        assert learned == "GOOD answer<|eot_id|>"


@pytest.mark.parametrize(
    "beside", [{"messages": said("hi", "salut")}, {"prompt": said("hi"), "completion": said("hi", "salut")[1:]},
               {"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "salut"}]}]
)  # fmt: skip
def test_a_system_prompt_beside_messages_is_the_first_of_them(learn, beside):
    expected = learn({"messages": said("hi", "salut", system="Speak French.")})
    assert learn({"system": "Speak French.", **beside}) == expected


def test_a_system_prompt_that_is_there_twice_is_there_once(learn):
    conversation = {"messages": said("hi", "salut", system="Speak French.")}
    assert learn({"system": "Speak French.", **conversation}) == learn(conversation)


def test_texts_in_parts_are_one_text(learn):
    parts = [{"role": "user", "content": [{"type": "text", "text": "a "}, {"type": "text", "text": "fox"}]}]
    assert learn({"messages": [*parts, *said("", "yes")[1:]]}) == learn({"messages": said("a fox", "yes")})


def user(**more) -> dict:
    return {"messages": [{**said("hello there")[0], **more}, *said("", "general")[1:]]}


OUT = "the chat template does not render all content: "


@pytest.mark.parametrize(
    ("example", "reason"),
    [
        (answers({"weight": 0.5}, {}), "a message's `weight` is neither 0 nor 1: that of message 2 is 0.5"),
        (answers({"train": "no"}, {}), "a message's `train` is neither 0 nor 1: that of message 2 is no"),
        (answers({"weight": 0, "loss": True}, {}), "a message has contradictory loss flags: message 2"),
        (answers({"weight": 0}, {"weight": 0}), "no assistant message is marked as learned"),
        (user(train=True), "a message that is not the assistant's is marked as learned: message 1"),
        (user(content=[{"type": "image", "image": "a.png"}]), "a part of a message is not text: a `image` in message 1"),
        (user(content=["hi"]), "a part of a message is not text: a str without text in message 1"),
        (user(images=["a.png"]), OUT + "message 1, its `images`"),
        (answers({"tool_calls": [{"name": "f"}]}, {}), OUT + "message 2, its `tool_calls`"),
        (answers({}, {"reasoning_content": "because"}), OUT + "message 4, its `reasoning_content`"),
        ({"messages": said("a", "b"), "images": ["a.png"]}, "its `images` would be lost"),
        ({"messages": said("a", "b"), "functions": [{"name": "f"}]}, "its `functions` would be lost"),
        ({"messages": said("a", "b"), "context": "the sky is green"}, "its `context` would be lost"),
        ({"messages": said("a", "b"), "weight": 0.5}, ("its `weight` asks for another loss weight than other "
         "examples: it is 0.5")),
        ({"messages": said("a", "b"), "conversations": said("a", "c")}, "its `messages` and `conversations` differ"),
        ({"messages": said("a", "b", system="x"), "system": "y"},
         "its `system` and its first message are different system prompts"),
        ({"messages": said("a", "b"), "system": 5}, "its `system` is not text: it is a int"),
    ],
)  # fmt: skip
def test_what_would_be_lost_is_refused_by_name(refusal, example, reason):
    assert refusal(example).split("\n\n")[0] == REFUSED + reason


@pytest.mark.parametrize("field", ["system", "input", "context", "history", "tools", "images"])
def test_a_field_beside_prompt_and_completion_is_named_in_the_template_or_refused(refusal, learn, field):
    example = {"prompt": "hi", "completion": "salut", field: "Speak French."}
    assert refusal(example, tokenizer=BYTE) == (
        REFUSED + f"its `{field}` would be lost\n\n"
        "hint: name it in `dataset.prompt_template`, for example `{system} {prompt}`, "
        f"or leave it out: `dataset.ignore_fields=[{field}]`, or leave such examples out: `dataset.skip_bad=true`"
    )
    ((whole, _),) = texts(BYTE, learn(example, tokenizer=BYTE, prompt_template=f"{{{field}}} {{prompt}}"))
    assert whole.startswith("Speak French. hi")


DEAF = PLAIN.replace("{% for message in messages %}", "{% for message in messages if message.role != 'critic' %}")


def test_a_message_that_the_template_leaves_out_is_refused(refusal, template):
    assert DEAF != PLAIN
    example = {"messages": [*said("a question"), {"role": "critic", "content": "too long a text"}, *said("", "an answer")[1:]]}
    assert refusal(example, chat_template=template(DEAF)).startswith(
        REFUSED + OUT + "message 2, of `critic`\n\nhint: use a template"
    )


def test_what_a_template_uses_may_be_there(learn, template):
    text = PLAIN.replace("{{ message.content }}", "{{ message.content }}{{ message.tool_calls }}", 1)
    example = answers({"tool_calls": [{"name": "f"}]}, {})
    assert len(learn(example, chat_template=template(text))) == 1


def test_fields_that_say_nothing_to_learn_are_named_once(learn):
    counts = Counts()
    learn(
        *({"messages": said("a question", "b"), "id": n, "prompt": "a question", "source": "x"} for n in range(3)), counts=counts
    )
    assert counts.reasons() == ["unused fields: `id`, `prompt`, `source`"]


def test_what_is_skipped_is_counted_by_its_reason(learn):
    counts = Counts()
    bad = {"messages": said("a", "b"), "images": ["a.png"]}
    learn(json.dumps(bad), {"messages": said("a", "b")}, counts=counts, skip_bad=True)
    assert counts.reasons()[0] == "skipped 1: its `images` would be lost"
