"""GLM-4: nothing ends an answer; the model stops at the token of the next role, which it writes itself."""

from tests.trainer.chat.family import ANSWERED, ASKED, SYSTEM, TOOLS, TURNS, Case, Family, said

FAMILY = Family(
    special=("<|endoftext|>", "[gMASK]", "<sop>", "<|system|>", "<|user|>", "<|assistant|>", "<|observation|>"),
    eos="<|endoftext|>",
    stops=("<|endoftext|>", "<|user|>", "<|observation|>"),
)
CALL = {"role": "assistant", "metadata": "weather", "content": '{"city": "Bern"}'}
STEPS = [
    {"role": "user", "content": "Weather?"},
    CALL,
    {"role": "observation", "content": "rain"},
    {"role": "assistant", "content": "It rains."},
]
FIRST = "[gMASK]<sop><|system|>\nBe quick.<|user|>\nWhat is it?<|assistant|>"
CALLED = '\nWeather?<|assistant|>⟦weather\n{"city": "Bern"}<|observation|>⟧'
CASES = {
    "two turns": Case(
        said(SYSTEM, *TURNS), (FIRST + "⟦\nA fox.<|user|>⟧\nAnd now?<|assistant|>⟦\nIt sleeps.<|user|>⟧",)
    ),
    "each answer": Case(
        said(SYSTEM, *TURNS),
        (FIRST + "⟦\nA fox.<|user|>⟧", FIRST + "\nA fox.<|user|>\nAnd now?<|assistant|>⟦\nIt sleeps.<|user|>⟧"),
        learn="each_answer",
    ),
    "a question last": Case(said(SYSTEM, *TURNS[:3]), (FIRST + "⟦\nA fox.<|user|>⟧\nAnd now?",)),
    "tools": Case(
        said(*STEPS, tools=TOOLS),
        (
            '[gMASK]<sop><|system|>\n# Tools\n\n## weather\n\n{\n    "name": "weather"\n}<|user|>'
            + CALLED + "\nrain<|assistant|>⟦\nIt rains.<|user|>⟧",
        ),
    ),
    "each step": Case(
        said(*STEPS),
        (
            "[gMASK]<sop><|user|>" + CALLED,
            ('[gMASK]<sop><|user|>\nWeather?<|assistant|>weather\n{"city": "Bern"}<|observation|>\nrain<|assistant|>'
            "⟦\nIt rains.<|user|>⟧"),
        ),
        learn="each_answer",
    ),
    "a call last": Case(
        said(*STEPS[:2]), refused="the chat template does not end the assistant's turn with a special token: message 2"
    ),
    "results under another name": Case(
        said(*STEPS[:2], {"role": "tool", "content": "rain"}, STEPS[3]),
        refused="the chat template does not render all content: message 3, of `tool`",
    ),
    "two answers in a row": Case(
        said(ASKED, ANSWERED, ANSWERED),
        refused="the chat template does not end the assistant's turn with a special token: "
        "after message 2 follows `<|assistant|>`\n\nhint: if the model stops at `<|assistant|>`, add it to `eos_token_id`",
    ),
}  # fmt: skip
