"""Mistral Small 3: the system prompt has a place of its own; a default one has the date, which is fixed."""

from tests.trainer.chat.family import SYSTEM, TOOLS, TURNS, Case, Family, said

FAMILY = Family(
    special=("<s>", "</s>", "[INST]", "[/INST]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]"), bos="<s>", eos="</s>", begins=True
)
TALK = "[INST]What is it?[/INST]⟦A fox.</s>⟧[INST]And now?[/INST]⟦It sleeps.</s>⟧"
DEFAULT = "You are Mistral Small 3. The current date is 2024-07-26."
CASES = {
    "two turns": Case(said(SYSTEM, *TURNS), ("<s>[SYSTEM_PROMPT]Be quick.[/SYSTEM_PROMPT]" + TALK,)),
    "no system": Case(said(*TURNS), (f"<s>[SYSTEM_PROMPT]{DEFAULT}[/SYSTEM_PROMPT]" + TALK,)),
    "each answer": Case(
        said(SYSTEM, *TURNS),
        (
            "<s>[SYSTEM_PROMPT]Be quick.[/SYSTEM_PROMPT][INST]What is it?[/INST]⟦A fox.</s>⟧",
            "<s>[SYSTEM_PROMPT]Be quick.[/SYSTEM_PROMPT][INST]What is it?[/INST]A fox.</s>[INST]And now?[/INST]⟦It sleeps.</s>⟧",
        ),
        learn="each_answer",
    ),
    "tools": Case(said(*TURNS, tools=TOOLS), refused="the chat template does not render all content: its `tools`"),
}
