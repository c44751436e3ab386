"""Mistral Nemo: as Mistral 7B v0.3, without the spaces."""

from tests.trainer.chat.families.mistral_v3 import STEPS
from tests.trainer.chat.family import SYSTEM, TOOLS, TURNS, Case, Family, said

FAMILY = Family(
    special=("<s>", "</s>", "[INST]", "[/INST]", "[TOOL_CALLS]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]",
             "[TOOL_RESULTS]", "[/TOOL_RESULTS]"),
    bos="<s>", eos="</s>", begins=True,
)  # fmt: skip
CASES = {
    "two turns": Case(said(*TURNS), ("<s>[INST]What is it?[/INST]⟦A fox.</s>⟧[INST]And now?[/INST]⟦It sleeps.</s>⟧",)),
    "tools": Case(
        said(*STEPS, tools=TOOLS),
        (
            (
                '<s>[AVAILABLE_TOOLS][{"type": "function", "function": {"name": "weather"}}][/AVAILABLE_TOOLS]'
                "[INST]Weather?[/INST]"
                '⟦[TOOL_CALLS][{"name": "weather", "arguments": {"city": "Bern"}, "id": "abcdefghi"}]</s>⟧'
                '[TOOL_RESULTS]{"content": 22, "call_id": "abcdefghi"}[/TOOL_RESULTS]⟦It rains.</s>⟧'
            ),
        ),
    ),
    "system": Case(said(SYSTEM, *TURNS), refused="the chat template does not render all content: message 1, of `system`"),
}
