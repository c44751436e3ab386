"""Granite 3.0: calls of tools have a role of their own, which the template renders as the assistant's."""

from tests.trainer.chat.family import SYSTEM, TOOLS, TURNS, Case, Family, said

FAMILY = Family(
    special=("<|end_of_text|>", "<|start_of_role|>", "<|end_of_role|>", "<|tool_call|>"),
    bos="<|end_of_text|>",
    eos="<|end_of_text|>",
)
ASSISTANT = "<|start_of_role|>assistant<|end_of_role|>"
FIRST = (
    "<|start_of_role|>system<|end_of_role|>Be quick.<|end_of_text|>\n"
    "<|start_of_role|>user<|end_of_role|>What is it?<|end_of_text|>\n" + ASSISTANT
)
LATER = "<|start_of_role|>user<|end_of_role|>And now?<|end_of_text|>\n" + ASSISTANT + "⟦It sleeps.<|end_of_text|>⟧\n"
STEPS = [
    {"role": "user", "content": "Weather?"},
    {"role": "assistant_tool_call", "content": '[{"name": "weather"}]'},
    {"role": "tool_response", "content": "rain"},
    {"role": "assistant", "content": "It rains."},
]
CASES = {
    "two turns": Case(said(SYSTEM, *TURNS), (FIRST + "⟦A fox.<|end_of_text|>⟧\n" + LATER,)),
    "each answer": Case(
        said(SYSTEM, *TURNS),
        (FIRST + "⟦A fox.<|end_of_text|>⟧\n", FIRST + "A fox.<|end_of_text|>\n" + LATER),
        learn="each_answer",
    ),
    "tools": Case(
        said(*STEPS, tools=TOOLS),
        (
            "<|start_of_role|>available_tools<|end_of_role|>\n"
            '{\n    "type": "function",\n    "function": {\n        "name": "weather"\n    }\n}<|end_of_text|>\n'
            "<|start_of_role|>user<|end_of_role|>Weather?<|end_of_text|>\n"
            + ASSISTANT + '⟦<|tool_call|>[{"name": "weather"}]<|end_of_text|>⟧\n'
            "<|start_of_role|>tool_response<|end_of_role|>rain<|end_of_text|>\n"
            + ASSISTANT + "⟦It rains.<|end_of_text|>⟧\n",
        ),
    ),
    "results under another name": Case(
        said(*STEPS[:2], {"role": "tool", "content": "rain"}, STEPS[3], tools=TOOLS),
        refused="the chat template does not render all content: message 3, of `tool`",
    ),
}  # fmt: skip
