"""Mistral 7B v0.3: tools come before the last question; the system prompt is rendered only before an answer, never with one."""

from tests.trainer.chat.family import ANSWERED, ASKED, SYSTEM, TOOLS, TURNS, Case, Family, call, said

FAMILY = Family(
    special=("<s>", "</s>", "[INST]", "[/INST]", "[TOOL_CALLS]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]",
             "[TOOL_RESULTS]", "[/TOOL_RESULTS]"),
    bos="<s>", eos="</s>", pieces="spaces", begins=True,
)  # fmt: skip
CALL = {"role": "assistant", "tool_calls": [call("weather", identity="abcdefghi", city="Bern")]}
STEPS = [
    {"role": "user", "content": "Weather?"},
    CALL,
    {"role": "tool", "content": "22", "tool_call_id": "abcdefghi"},
    {"role": "assistant", "content": "It rains."},
]
LISTED = '[AVAILABLE_TOOLS] [{"type": "function", "function": {"name": "weather"}}][/AVAILABLE_TOOLS]'
CALLED = '[TOOL_CALLS] [{"name": "weather", "arguments": {"city": "Bern"}, "id": "abcdefghi"}]</s>'
RESULT = '[TOOL_RESULTS] {"content": 22, "call_id": "abcdefghi"}[/TOOL_RESULTS]'
CASES = {
    "two turns": Case(said(*TURNS), ("<s>[INST] What is it?[/INST]⟦ A fox.</s>⟧[INST] And now?[/INST]⟦ It sleeps.</s>⟧",)),
    "tools": Case(said(*STEPS, tools=TOOLS), (f"<s>{LISTED}[INST] Weather?[/INST]⟦{CALLED}⟧{RESULT}⟦ It rains.</s>⟧",)),
    "tools move to the last question": Case(
        said(ASKED, ANSWERED, *STEPS, tools=TOOLS),
        refused="with this chat template what follows an answer changes its tokens: message 2",
    ),
    "each answer of these": Case(
        said(ASKED, ANSWERED, *STEPS, tools=TOOLS),
        (
            f"<s>{LISTED}[INST] What is it?[/INST]⟦ A fox.</s>⟧",
            f"<s>[INST] What is it?[/INST] A fox.</s>{LISTED}[INST] Weather?[/INST]⟦{CALLED}⟧",
            f"<s>[INST] What is it?[/INST] A fox.</s>{LISTED}[INST] Weather?[/INST]{CALLED}{RESULT}⟦ It rains.</s>⟧",
        ),
        learn="each_answer",
    ),
    "system": Case(said(SYSTEM, *TURNS), refused="the chat template does not render all content: message 1, of `system`"),
    "system of one answer": Case(
        said(SYSTEM, ASKED, ANSWERED),
        learn="last_answer",
        refused="the chat template does not render all content: message 1, of `system`",
    ),
    "a text beside a call": Case(
        said(STEPS[0], {**CALL, "content": "Let me look."}, *STEPS[2:], tools=TOOLS),
        refused="the chat template does not render all content: message 2, of `assistant`",
    ),
    "a call without its number": Case(
        said(STEPS[0], {"role": "assistant", "tool_calls": [call("weather", city="Bern")]}, *STEPS[2:], tools=TOOLS),
        refused="the chat template refuses it: Tool call IDs should be alphanumeric",
    ),
}
