"""Qwen3: thoughts are rendered only after the last question, and are empty in an answer without them."""

from tests.trainer.chat.family import ANSWERED, ASKED, SYSTEM, TURNS, Case, Family, call, said

FAMILY = Family(
    special=("<|endoftext|>", "<|im_start|>", "<|im_end|>"),
    added=("<think>", "</think>", "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>"),
    eos="<|im_end|>",
)
THOUGHTFUL = [SYSTEM, ASKED, {**ANSWERED, "reasoning_content": "Red fur."}, TURNS[2], {**TURNS[3], "reasoning_content": "Eyes."}]
INLINE = [ASKED, {"role": "assistant", "content": "<think>\nRed fur.\n</think>\n\nA fox."}]
STEPS = [
    {"role": "user", "content": "Weather?"},
    {"role": "assistant", "reasoning_content": "Look.", "tool_calls": [call("weather", city="Bern")]},
    {"role": "tool", "content": "rain"},
    {"role": "assistant", "reasoning_content": "So.", "content": "It rains."},
]
SILENT = [STEPS[0], {"role": "assistant", "tool_calls": [call("weather", city="Bern")]}, *STEPS[2:]]
HEAD = "<|im_start|>system\nBe quick.<|im_end|>\n<|im_start|>user\nWhat is it?<|im_end|>\n<|im_start|>assistant\n"
LATER = "<|im_start|>user\nAnd now?<|im_end|>\n<|im_start|>assistant\n"
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Bern"}}\n</tool_call><|im_end|>'
RESULT = "<|im_start|>user\n<tool_response>\nrain\n</tool_response><|im_end|>\n<|im_start|>assistant\n"
DROPPED = "with this chat template what follows an answer changes its tokens: message {}\n\nhint: learn the last answer alone"
EACH = (
    HEAD + "⟦<think>\nRed fur.\n</think>\n\nA fox.<|im_end|>⟧\n",
    HEAD + "A fox.<|im_end|>\n" + LATER + "⟦<think>\nEyes.\n</think>\n\nIt sleeps.<|im_end|>⟧\n",
)
SHORT = {"chat_template_kwargs": {"enable_thinking": False}}
CASES = {
    "each answer sees no earlier thoughts": Case(said(*THOUGHTFUL), EACH, learn="each_answer"),
    "last answer": Case(said(*THOUGHTFUL), EACH[1:], learn="last_answer"),
    "all answers would lose thoughts": Case(said(*THOUGHTFUL), refused=DROPPED.format(3)),
    "all answers would lose empty thoughts": Case(said(SYSTEM, *TURNS), refused=DROPPED.format(3)),
    "thoughts in the text": Case(
        said(*INLINE),
        (("<|im_start|>user\nWhat is it?<|im_end|>\n<|im_start|>assistant\n"
         "⟦<think>\nRed fur.\n</think>\n\nA fox.<|im_end|>⟧\n"),),
    ),
    "no thoughts": Case(said(SYSTEM, ASKED, ANSWERED), (HEAD + "⟦<think>\n\n</think>\n\nA fox.<|im_end|>⟧\n",)),
    "thinking switched off": Case(
        said(SYSTEM, ASKED, ANSWERED, **SHORT), (HEAD + "<think>\n\n</think>\n\n⟦A fox.<|im_end|>⟧\n",)
    ),
    "thinking switched off in each answer": Case(
        said(SYSTEM, *TURNS, **SHORT),
        (
            HEAD + "<think>\n\n</think>\n\n⟦A fox.<|im_end|>⟧\n",
            HEAD + "A fox.<|im_end|>\n" + LATER + "<think>\n\n</think>\n\n⟦It sleeps.<|im_end|>⟧\n",
        ),
        learn="each_answer",
    ),
    "thoughts though switched off": Case(
        said(*INLINE, **SHORT), refused="with this chat template an answer changes the tokens before it: message 2"
    ),
    "steps of one question": Case(
        said(*STEPS),
        ("<|im_start|>user\nWeather?<|im_end|>\n<|im_start|>assistant\n⟦<think>\nLook.\n</think>\n\n" + CALL + "⟧\n"
         + RESULT + "⟦<think>\nSo.\n</think>\n\nIt rains.<|im_end|>⟧\n",),
    ),
    "a step without thoughts": Case(said(*SILENT), refused=DROPPED.format(2)),
    "each of these steps": Case(
        said(*SILENT),
        (
            "<|im_start|>user\nWeather?<|im_end|>\n<|im_start|>assistant\n⟦<think>\n\n</think>\n\n" + CALL + "⟧\n",
            "<|im_start|>user\nWeather?<|im_end|>\n<|im_start|>assistant\n" + CALL + "\n"
            + RESULT + "⟦<think>\nSo.\n</think>\n\nIt rains.<|im_end|>⟧\n",
        ),
        learn="each_answer",
    ),
}  # fmt: skip
