"""Qwen2.5: a system prompt of its own where none is given; the results of tools are grouped in one turn of the user."""

from tests.trainer.chat.family import SYSTEM, TOOLS, TURNS, Case, Family, call, said

FAMILY = Family(
    special=("<|endoftext|>", "<|im_start|>", "<|im_end|>"),
    added=("<tool_call>", "</tool_call>"),
    eos="<|im_end|>",
)
RESULTS = [{"role": "tool", "content": text} for text in ("rain", "sun")]
WEATHER = [
    {"role": "user", "content": "Weather?"},
    {"role": "assistant", "tool_calls": [call("weather", city="Bern"), call("weather", city="Rome")]},
    *RESULTS,
    {"role": "assistant", "content": "Rain and sun."},
]
FIRST = (
    "<|im_start|>system\nBe quick.<|im_end|>\n<|im_start|>user\nWhat is it?<|im_end|>\n"
    "<|im_start|>assistant\n⟦A fox.<|im_end|>⟧\n"
)
CASES = {
    "two turns": Case(
        said(SYSTEM, *TURNS),
        (FIRST + "<|im_start|>user\nAnd now?<|im_end|>\n<|im_start|>assistant\n⟦It sleeps.<|im_end|>⟧\n",),
    ),
    "each answer": Case(
        said(SYSTEM, *TURNS),
        (
            FIRST,
            (
                "<|im_start|>system\nBe quick.<|im_end|>\n<|im_start|>user\nWhat is it?<|im_end|>\n<|im_start|>assistant\nA fox."
                "<|im_end|>\n<|im_start|>user\nAnd now?<|im_end|>\n<|im_start|>assistant\n⟦It sleeps.<|im_end|>⟧\n"
            ),
        ),
        learn="each_answer",
    ),
    "tools": Case(
        said(*WEATHER, tools=TOOLS),
        (
            (
                "<|im_start|>system\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant.\n\n# Tools\n\n<tools>\n"
                '{"type": "function", "function": {"name": "weather"}}\n</tools><|im_end|>\n'
                "<|im_start|>user\nWeather?<|im_end|>\n<|im_start|>assistant\n"
                '⟦<tool_call>\n{"name": "weather", "arguments": {"city": "Bern"}}\n</tool_call>\n'
                '<tool_call>\n{"name": "weather", "arguments": {"city": "Rome"}}\n</tool_call><|im_end|>⟧\n'
                "<|im_start|>user\n<tool_response>\nrain\n</tool_response>\n<tool_response>\nsun\n</tool_response><|im_end|>\n"
                "<|im_start|>assistant\n⟦Rain and sun.<|im_end|>⟧\n"
            ),
        ),
    ),
    "thoughts": Case(
        said(TURNS[0], {**TURNS[1], "reasoning_content": "Red fur."}),
        refused="the chat template does not render all content: message 2, its `reasoning_content`",
    ),
}
