"""What of a conversation is learned, against transformers' own mask."""

from __future__ import annotations

import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer, ByT5Tokenizer

from formats.errors import UserError
from tests.trainer.chat import llama
from tests.trainer.chat.llama import BEGIN, CHATML, EOT, HEAD, HEAD_END, IM_END, IM_START, MARKED, PLAIN, said
from trainer import tokenizers

OR_SKIP = ", or leave such examples out: `dataset.skip_bad=true`"
MARK_THEM = (
    "mark the answers in the template with `{% generation %}` and `{% endgeneration %}`: `dataset.chat_template=FILE`" + OR_SKIP
)
REFUSED = "`a.jsonl`, line {} cannot be used: "

CONVERSATIONS = [
    said("what is it?", "a fox"),
    said("what is it?", "it is  a\n\n\nfox, 12345!", "and?", "the lazy dog\n", system="be quick"),
    said("\n\n", "grün 🙂 日本\n\n", " ", "  x", "\n", "y\n\n"),
    said("what?", "it", "and?"),
    [*said("a"), *said("b", "c"), {"role": "assistant", "content": "d"}],
    said("say <|eot_id|>", "<|eot_id|>?"),
]


@pytest.fixture(scope="module")
def marked(tmp_path_factory):
    return llama.save(tmp_path_factory.mktemp("marked"), template=MARKED)


@pytest.fixture(scope="module")
def oracle(marked):
    """transformers: the tokens of a conversation, and which of them the assistant wrote."""
    tokenizer = AutoTokenizer.from_pretrained(marked)

    def read(messages):
        made = tokenizer.apply_chat_template(messages, return_assistant_tokens_mask=True, return_dict=True)
        return made["input_ids"], made["assistant_masks"]

    return read


def test_growing_prefixes_and_marks_both_give_transformers_tokens_and_mask(learn, marked, oracle):
    expected = [oracle(messages) for messages in CONVERSATIONS]
    examples = [{"messages": messages} for messages in CONVERSATIONS]
    assert learn(*examples) == expected
    assert learn(*examples, tokenizer=tokenizers.load(str(marked))) == expected
    assert all(0 < sum(mask) < len(mask) for _, mask in expected)


texts = st.text(st.sampled_from("a fox\n\t,1日🙂?"), min_size=1, max_size=12)


def learned(learn, example, **settings):
    """What is learned of it; None where it is refused."""
    try:
        [result] = learn(example, **settings)
    except UserError:
        return None
    return result


def continues(renderer, messages):
    """Are the prompts that the model would be given the first tokens of the conversation?"""
    whole = renderer.apply_chat_template(messages, return_dict=False)
    asked = [number for number, message in enumerate(messages) if message["role"] == "assistant"]
    prompts = (renderer.apply_chat_template(messages[:number], add_generation_prompt=True, return_dict=False) for number in asked)
    return all(whole[: len(prompt)] == prompt for prompt in prompts)


@given(st.lists(texts, min_size=2, max_size=7), st.none() | texts)
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_texts_are_learned_as_transformers_masks_them_or_refused(learn, marked, oracle, turns, system):
    example = {"messages": said(*turns, system=system)}
    expected = oracle(example["messages"])
    fits = continues(AutoTokenizer.from_pretrained(marked), example["messages"])
    assert learned(learn, example) == (expected if fits else None)
    assert learned(learn, example, tokenizer=tokenizers.load(str(marked))) in ([expected] if fits else [expected, None])


def test_the_tokens_of_a_conversation_are_these(learn, tokenizer):
    [(tokens, trained)] = learn({"messages": said("what is it?", "a fox", "and?", "12", system="be quick")})
    encode, gap = tokenizer.encode, tokenizer.encode("\n\n")
    before = [BEGIN, HEAD, *encode("system"), HEAD_END, *gap, *encode("be quick"), EOT]
    before += [HEAD, *encode("user"), HEAD_END, *gap, *encode("what is it?"), EOT]
    before += [HEAD, *encode("assistant"), HEAD_END, *gap]
    first = [*encode("a fox"), EOT]
    between = [HEAD, *encode("user"), HEAD_END, *gap, *encode("and?"), EOT, HEAD, *encode("assistant"), HEAD_END, *gap]
    second = [*encode("12"), EOT]
    assert tokens == before + first + between + second
    assert trained == [0] * len(before) + [1] * len(first) + [0] * len(between) + [1] * len(second)


def test_white_space_that_the_template_writes_after_the_turn_is_not_learned(learn, template, tokenizer):
    [(tokens, trained)] = learn({"messages": said("what?", "a fox\n")}, chat_template=template(CHATML))
    encode = tokenizer.encode
    before = [IM_START, *encode("user\n"), *encode("what?"), IM_END, *encode("\n"), IM_START, *encode("assistant\n")]
    answer = [*encode("a fox\n"), IM_END]
    assert tokens == [*before, *answer, *encode("\n")]
    assert trained == [0] * len(before) + [1] * len(answer) + [0] * len(encode("\n"))


def test_white_space_after_the_turn_is_not_learned_inside_a_generation_mark_either(learn, template, tokenizer):
    text = CHATML.replace(
        "{{ message.content }}<|im_end|>\n", "{% generation %}{{ message.content }}<|im_end|>\n{% endgeneration %}"
    )
    [(tokens, trained)] = learn({"messages": said("what?", "a fox")}, chat_template=template(text))
    assert tokens[-2:] == [IM_END, *tokenizer.encode("\n")]
    assert trained[-3:] == [1, 1, 0]


def test_places_of_tokens_that_leave_white_space_out_do_not_move_the_answers(learn, tmp_path, oracle):
    """Llama 3's own tokenizer has them, and transformers' mask of such an answer is empty: the oracle is the other tokenizer."""
    trimmed = tokenizers.load(str(llama.save(tmp_path / "trimmed", template=MARKED, trim_offsets=True)))
    assert [learn({"messages": talk}, tokenizer=trimmed)[0] for talk in CONVERSATIONS] == [oracle(talk) for talk in CONVERSATIONS]


def test_a_tokenizer_that_tells_no_places_is_asked_with_growing_prefixes(learn, template, tmp_path):
    ByT5Tokenizer().save_pretrained(tmp_path / "slow")
    (tmp_path / "slow" / "tokenizer.json").unlink(missing_ok=True)
    slow, end = tokenizers.load(str(tmp_path / "slow")), "</s>"
    text = MARKED.replace("<|eot_id|>", end).replace("{{ bos_token }}", "")
    [(tokens, trained)] = learn({"messages": said("was?", "grün")}, tokenizer=slow, chat_template=template(text))
    assert slow.decode([token for token, on in zip(tokens, trained, strict=True) if on]) == f"grün{end}"


def test_sharegpt_says_the_same_in_other_words(learn):
    messages = said("what?", "it", "and?", "a fox", system="be quick")
    names = {"user": "human", "assistant": "gpt", "system": "system"}
    other = [{"from": names[message["role"]], "value": message["content"]} for message in messages]
    assert learn({"conversations": other}) == learn({"messages": other}) == learn({"messages": messages})


def test_of_a_prompt_and_a_completion_of_messages_the_completion_is_learned(learn, template):
    prompt, completion = said("what?", "it", "and?"), said("a", "a fox")[1:]
    [(tokens, trained)] = learn({"prompt": prompt, "completion": completion})
    [(whole, every)] = learn({"messages": prompt + completion})
    assert tokens == whole
    last = len(every) - 1 - every[::-1].index(0)
    assert trained == [0] * (last + 1) + every[last + 1 :]
    marks = learn({"prompt": prompt, "completion": completion}, chat_template=template(MARKED))
    assert marks == [(tokens, trained)]


def test_tools_pass_through_the_template_as_objects_or_as_json(learn, template, tokenizer):
    tools = [{"type": "function", "function": {"name": "fox", "parameters": {}}}]
    path = template("{% for tool in tools %}{{ tool.function.name }}<|eot_id|>{% endfor %}" + PLAIN)
    messages = said("what?", "it")
    examples = learn(
        {"messages": messages, "tools": tools}, {"messages": messages, "tools": json.dumps(tools)}, chat_template=path
    )
    assert examples[0] == examples[1]
    assert tokenizer.decode(examples[0][0]).startswith("fox<|eot_id|><|begin_of_text|>")


def test_an_answer_may_be_a_call_without_content(learn, template, tokenizer):
    path = template(PLAIN.replace("{{ message.content }}", "{{ message.content or message.tool_calls[0].name }}"))
    call = {"role": "assistant", "content": None, "tool_calls": [{"name": "fox"}]}
    messages = [*said("what?"), call, {"role": "tool", "content": "42"}, {"role": "assistant", "content": "it"}]
    [(tokens, trained)] = learn({"messages": messages}, chat_template=path)
    learned = [token for token, on in zip(tokens, trained, strict=True) if on]
    assert tokenizer.decode(learned) == "fox<|eot_id|>it<|eot_id|>"


def test_today_is_the_same_day_every_day(learn, template, tokenizer):
    text = "{% if strftime_now is defined %}{{ strftime_now(\"%d %b %Y\") }} {{ strftime_now('%Y') }}{% endif %} "
    [(tokens, _)] = learn({"messages": said("what?", "it")}, chat_template=template(text + PLAIN))
    assert tokenizer.decode(tokens).startswith("26 Jul 2024 2024 <|begin_of_text|>")


def test_a_day_in_a_form_that_only_the_template_knows_is_an_error(refusal, template):
    text = "{% set form = '%d' %}{{ strftime_now(form) }}" + PLAIN
    reason = "the chat template refuses it: it formats a date with a format that is not a literal"
    assert refusal({"messages": said("what?", "it")}, chat_template=template(text)).startswith(REFUSED.format(1) + reason)


STRIPS = (
    "{{ bos_token }}{% for message in messages %}<|start_header_id|>{{ message.role }}<|end_header_id|>"
    "{% if message.role == 'assistant' and not loop.last %}{{ message.content.split('.')[-1] }}"
    "{% else %}{{ message.content }}{% endif %}"
    "<|eot_id|>{% endfor %}{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>{% endif %}"
)
"""As reasoning models do: of answers before the last one, a part is left out."""


def test_a_template_that_changes_what_it_wrote_is_an_error_and_no_guess(refusal, learn, template):
    settings = {"chat_template": template(STRIPS)}
    assert learn({"messages": said("a", "hm. b")}, **settings)
    assert refusal({"messages": said("a", "b")}, {"messages": said("a", "hm. b", "c", "d")}, **settings) == (
        REFUSED.format(2) + "with this chat template what follows an answer changes its tokens: message 2\n\n"
        "hint: learn the last answer alone, or each in an example of its own: "
        "`dataset.learn=last_answer`, `dataset.learn=each_answer`" + OR_SKIP
    )
    settings = {"chat_template": template("{{ messages | length }}" + PLAIN)}
    assert refusal({"messages": said("a", "b")}, **settings).startswith(
        REFUSED.format(1) + "with this chat template an answer changes the tokens before it: message 2\n\n"
    )


def test_an_answer_whose_tokens_begin_before_it_is_an_error(refusal, template):
    """The space that ends the prompt becomes part of the answer's first word."""
    text = PLAIN.replace("assistant<|end_header_id|>\n\n", "assistant<|end_header_id|>\n\n: ").replace(
        "{{ message.content }}", "{{ ': ' if message.role == 'assistant' else '' }}{{ message.content }}", 1
    )
    assert "an answer changes the tokens before it: message 2" in refusal(
        {"messages": said("a", "fox")}, chat_template=template(text)
    )
    text = MARKED.replace("{% generation %}", ": {% generation %}")
    assert refusal({"messages": said("a", "fox")}, chat_template=template(text)) == (
        REFUSED.format(1) + "a token is partly inside a generation mark of the chat template: "
        "the one from character 119 to 132\n\n"
        f"hint: put the marks at token boundaries, for example right after a special token{OR_SKIP}"
    )


def test_a_turn_that_no_special_token_ends_is_an_error(refusal, template):
    text = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"
    assert refusal({"messages": said("a", "b")}, chat_template=template(text)) == (
        REFUSED.format(1)
        + f"the chat template does not end the assistant's turn with a special token: message 2\n\nhint: {MARK_THEM}"
    )


NO_JSON = "its `tools` are not JSON: the fault is at line 1, column 2"


@pytest.mark.parametrize(
    ("example", "reason"),
    [
        ({"messages": said("a")}, "it has no assistant message"),
        ({"messages": []}, "its `messages` is not a list of messages: it is empty"),
        ({"messages": "a"}, "its `messages` is not a list of messages: it is a str"),
        ({"messages": ["a"]}, "a message is not an object: message 1 is a str"),
        ({"messages": [{"content": "a"}]}, "a message has no `role`: message 1 has `content`"),
        ({"messages": [{"role": "user"}]}, "a message has no `content`: message 1 has `role`"),
        ({"messages": [{"role": "user", "content": 1}]}, "a message's `content` is not text: that of message 1 is a int"),
        ({"messages": said("a", "")}, "an answer is empty: message 2"),
        ({"messages": [{"from": "alien", "value": "a"}]}, "a message has an unknown `from`: that of message 1 is `alien`"),
        ({"messages": said("a", "\ud800")}, "it contains an unpaired surrogate, which is not valid text"),
        ({"messages": said("a", "b"), "tools": "{"}, NO_JSON),
        ({"messages": said("a", "b")[1:]}, "the first message is the assistant's: there is no prefix to render before it"),
        ({"completion": said("a", "b")[1:]}, "it has no `prompt`: it has `completion`"),
    ],
)  # fmt: skip
def test_what_is_no_conversation_is_named(refusal, example, reason):
    assert refusal(example).split("\n\n")[0] == REFUSED.format(1) + reason


def test_what_a_template_refuses_is_told_in_its_words(refusal, learn, template):
    text = "{% if messages | length > 2 %}{{ raise_exception('too long a talk') }}{% endif %}" + PLAIN
    examples = [{"messages": said("a", "b")}, {"messages": said("a", "b", "c", "d")}]
    assert refusal(*examples, chat_template=template(text)) == (
        REFUSED.format(2) + "the chat template refuses it: too long a talk\n\n"
        "hint: correct it, or leave such examples out: `dataset.skip_bad=true`"
    )
    assert len(learn(*examples, chat_template=template(text), skip_bad=True)) == 1


def test_without_a_template_no_conversation_can_be_read_whatever_is_skipped(refusal, template, tmp_path):
    bare = llama.save(tmp_path / "bare", template=None)
    example = {"messages": said("a", "b")}
    assert refusal(example, tokenizer=tokenizers.load(str(bare)), skip_bad=True) == (
        "the tokenizer in `bare` has no chat template, and the examples are conversations\n\n"
        "hint: give a file with one: `dataset.chat_template=FILE`; base models seldom have one, their instruct models do"
    )
    assert refusal(example, tokenizer=tokenizers.load("byte"), skip_bad=True) == (
        "the `byte` tokenizer has no chat template, and no tokens that end a turn\n\n"
        "hint: train on examples of `prompt` and `completion`, or name another tokenizer: `tokenizer.tokenizer_model=DIR`"
    )
    assert refusal(example, chat_template=str(tmp_path / "none"), skip_bad=True) == (
        "cannot read `dataset.chat_template`, which is `none`: No such file or directory\n\n"
        "hint: give a file with a Jinja template"
    )
    broken = refusal(example, chat_template=template("{% for %}"), skip_bad=True)
    assert broken.startswith("the chat template is not readable: the fault is at line 1\n")


def test_a_folder_that_transformers_cannot_read_is_named(refusal, tmp_path):
    odd = llama.save(tmp_path / "odd")
    (odd / "tokenizer_config.json").write_text('{"eos_token": "<|eot_id|>", "extra_special_tokens": 5}')
    assert refusal({"messages": said("a", "b")}, tokenizer=tokenizers.load(str(odd))) == (
        "transformers, which renders chat templates, cannot read `odd` (`TypeError`)\n\n"
        "hint: save the tokenizer with transformers' `save_pretrained`, which writes `tokenizer.json`, or fetch its files again"
    )
