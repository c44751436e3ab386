"""Templates that change earlier turns: one answer is learned, or each in an example of its own, against transformers."""

from __future__ import annotations

import pytest
from transformers import AutoTokenizer

from tests.trainer.chat.llama import MARKED, PLAIN, said
from tests.trainer.chat.templates import LAST_QUESTION, THINKING

TURNS = said("one?", "the first answer", "two?", "the second", "three?", "the third")
THOUGHTS = [{**turn, "reasoning_content": f"thinking of {n}"} if n % 2 else turn for n, turn in enumerate(TURNS)]
INLINE = [{"role": turn["role"], "content": f"<think>\n{turn['reasoning_content']}\n</think>\n\n{turn['content']}"}
          if "reasoning_content" in turn else turn for turn in THOUGHTS]  # fmt: skip
SYSTEM = said("one?", "the first answer", "two?", "the second", system="Be quick.")
REWRITING = [(THINKING, THOUGHTS), (THINKING, INLINE), (LAST_QUESTION, SYSTEM)]
NAMES = ["thoughts", "thoughts in the text", "system prompt"]


def expected(folder, messages, template, number):
    """What transformers makes of the messages up to answer `number`, and which of those tokens are not the prompt's."""
    theirs = AutoTokenizer.from_pretrained(folder)
    before = theirs.apply_chat_template(messages[:number], chat_template=template, add_generation_prompt=True, return_dict=False)
    after = theirs.apply_chat_template(messages[: number + 1], chat_template=template, return_dict=False)
    assert after[: len(before)] == before
    return after, [0] * len(before) + [1] * (len(after) - len(before))


def without_line_end(example, tokenizer):
    """White space that a template writes behind the end of a turn is not learned."""
    tokens, trained = example
    if tokenizer.decode(tokens[-1:]) == "\n":
        trained = [*trained[:-1], 0]
    return tokens, trained


@pytest.mark.parametrize("case", REWRITING, ids=NAMES)
def test_each_answer_is_learned_behind_what_the_model_would_see(learn, template, folder, tokenizer, case):
    text, messages = case
    answers = [number for number, message in enumerate(messages) if message["role"] == "assistant"]
    wanted = [without_line_end(expected(folder, messages, text, number), tokenizer) for number in answers]
    settings = {"chat_template": template(text)}
    assert learn({"messages": messages}, learn="each_answer", **settings) == wanted
    assert learn({"messages": messages}, learn="last_answer", **settings) == wanted[-1:]
    trailing = [*messages, {"role": "user", "content": "and?"}]
    assert learn({"messages": trailing}, learn="last_answer", **settings) == wanted[-1:]


@pytest.mark.parametrize(("text", "messages"), REWRITING, ids=NAMES)
def test_all_answers_at_once_are_refused_with_the_way_out(refusal, template, text, messages):
    message = refusal({"messages": messages}, chat_template=template(text))
    assert "changes its tokens: message" in message
    assert "`dataset.learn=last_answer`, `dataset.learn=each_answer`" in message


ONCE = [(THINKING, THOUGHTS[:2]), (LAST_QUESTION, SYSTEM[:3]), (LAST_QUESTION, SYSTEM[1:])]


@pytest.mark.parametrize(("text", "messages"), ONCE, ids=["one question", "one turn", "no system prompt"])
def test_the_same_templates_take_all_answers_where_nothing_is_rewritten(learn, template, folder, text, messages):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ((tokens, _),) = learn({"messages": messages}, chat_template=template(text))
    assert tokens == tokenizer.apply_chat_template(messages, chat_template=text, return_dict=False)


def test_transformers_own_mask_has_the_same_last_answer(learn, template, folder, tokenizer):
    marked = THINKING.replace("<|im_start|>assistant\n{% if loop", "<|im_start|>assistant\n{% generation %}{% if loop").replace(
        "{%- endfor %}<|im_end|>\n", "{%- endfor %}<|im_end|>{% endgeneration %}\n", 1
    )
    theirs = AutoTokenizer.from_pretrained(folder)
    made = theirs.apply_chat_template(THOUGHTS, chat_template=marked, return_assistant_tokens_mask=True, return_dict=True)
    tokens, mask = made["input_ids"], made["assistant_masks"]
    last = len(mask) - mask[::-1].index(1)
    begin = max(position for position in range(last) if not mask[position]) + 1
    only_last = [0] * begin + [1] * (last - begin) + [0] * (len(mask) - last)
    assert sum(only_last) < sum(mask)
    assert learn({"messages": THOUGHTS}, learn="last_answer", chat_template=template(marked)) == [(tokens, only_last)]


@pytest.mark.parametrize("text", [PLAIN, MARKED], ids=["plain", "marked"])
def test_answers_that_are_not_to_be_learned_make_no_examples(learn, template, text):
    messages = said("a", "GOOD one", "b", "GOOD two", "c", "BAD")
    messages[-1]["weight"] = 0
    settings = {"chat_template": template(text)}
    each = learn({"messages": messages}, learn="each_answer", **settings)
    assert each == [learn({"messages": messages[:end]}, learn="last_answer", **settings)[0] for end in (2, 4)]
    assert learn({"messages": messages}, learn="last_answer", **settings) == each[1:]


def test_thoughts_that_no_answer_shows_are_refused_all_the_same(refusal, template):
    text = THINKING.replace("{{ thoughts }}", "")
    assert "message 2, its `reasoning_content`" in refusal(
        {"messages": THOUGHTS}, chat_template=template(text), learn="last_answer"
    )


FORGETFUL = """\
{%- for m in messages %}<|im_start|>{{ m.role }}
{% if m.role == 'tool' and loop.index0 + 2 < messages | length %}(gone){% else %}{{ m.content }}{% endif %}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
"""What tools said is forgotten once it was answered."""


@pytest.mark.parametrize("marks", [False, True])
def test_what_a_tool_said_and_the_template_forgets_is_seen_by_the_answer_to_it(refusal, learn, template, tokenizer, marks):
    text = FORGETFUL
    if marks:
        text = text.replace("{{ m.content }}{% endif %}<|im_end|>", "{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}"
                            "{% endif %}").replace("(gone)", "(gone)<|im_end|>")  # fmt: skip
        text = text.replace("{% else %}{% gen", "{% elif m.role != 'assistant' %}{{ m.content }}<|im_end|>{% else %}{% gen")
    messages = [*said("a", "b"), {"role": "tool", "content": "rain today"}, *said("c", "d", "e")[1:]]
    messages.append({"role": "assistant", "content": "the end"})
    settings = {"chat_template": template(text)}
    assert "what follows an answer changes its tokens: message 3" in refusal({"messages": messages}, **settings)
    each = [tokenizer.decode(tokens) for tokens, _ in learn({"messages": messages}, learn="each_answer", **settings)]
    assert ["rain today" in text for text in each] == [False, True, False]


def test_steps_with_tools_after_the_last_question_are_learned_together(learn, template, tokenizer):
    steps = [{"role": "assistant", "reasoning_content": "look it up", "tool_calls": [{"name": "f", "arguments": {"a": 1}}]},
             {"role": "tool", "content": "rain"},
             {"role": "assistant", "reasoning_content": "so it rains", "content": "It rains."}]  # fmt: skip
    ((tokens, trained),) = learn({"messages": [*said("Weather?"), *steps]}, chat_template=template(THINKING))
    learned = tokenizer.decode([token for token, on in zip(tokens, trained, strict=True) if on])
    assert "look it up" in learned
    assert "so it rains" in learned
    assert "Weather?" not in learned
