"""Llama 3.1: a system turn with dates always, tools in the first question, one call in an answer and no text beside it."""

from tests.trainer.chat.family import SYSTEM, TOOLS, TURNS, Case, Family, call, said

FAMILY = Family(
    special=("<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    bos="<|begin_of_text|>",
    eos="<|eot_id|>",
    begins=True,
)
HEAD = "<|start_header_id|>{}<|end_header_id|>\n\n".format
BEGIN = "<|begin_of_text|>" + HEAD("system")
DATES = "Cutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024\n\n"
FIRST = BEGIN + DATES + "Be quick.<|eot_id|>" + HEAD("user") + "What is it?<|eot_id|>" + HEAD("assistant")
LATER = HEAD("user") + "And now?<|eot_id|>" + HEAD("assistant") + "⟦It sleeps.<|eot_id|>⟧"
ONE = {"role": "assistant", "tool_calls": [call("weather", city="Bern")]}
STEPS = [
    {"role": "user", "content": "Weather?"},
    ONE,
    {"role": "tool", "content": "rain"},
    {"role": "assistant", "content": "It rains."},
]
CASES = {
    "two turns": Case(said(SYSTEM, *TURNS), (FIRST + "⟦A fox.<|eot_id|>⟧" + LATER,)),
    "each answer": Case(
        said(SYSTEM, *TURNS),
        (FIRST + "⟦A fox.<|eot_id|>⟧", FIRST + "A fox.<|eot_id|>" + LATER),
        learn="each_answer",
    ),
    "tools": Case(
        said(*STEPS, tools=TOOLS),
        (
            BEGIN + "Environment: ipython\n" + DATES + "<|eot_id|>" + HEAD("user")
            + '{\n    "type": "function",\n    "function": {\n        "name": "weather"\n    }\n}\n\nWeather?<|eot_id|>'
            + HEAD("assistant") + '⟦{"name": "weather", "parameters": {"city": "Bern"}}<|eot_id|>⟧'
            + HEAD("ipython") + '"rain"<|eot_id|>' + HEAD("assistant") + "⟦It rains.<|eot_id|>⟧",
        ),
    ),
    "two calls": Case(
        said(STEPS[0], {**ONE, "tool_calls": ONE["tool_calls"] * 2}, *STEPS[2:], tools=TOOLS),
        refused="the chat template refuses it: This model only supports single tool-calls at once!",
    ),
    "a text beside a call": Case(
        said(STEPS[0], {**ONE, "content": "Let me look."}, *STEPS[2:], tools=TOOLS),
        refused="the chat template does not render all content: message 2, of `assistant`",
    ),
}  # fmt: skip
