"""Gemma 3: as Gemma 2, and the system prompt begins the first question."""

from tests.trainer.chat.family import SYSTEM, TOOLS, TURNS, Case, Family, said

FAMILY = Family(
    special=("<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>"), bos="<bos>", eos="<eos>", pieces="spaces", begins=True
)
FIRST = "<bos><start_of_turn>user\nBe quick.\n\nWhat is it?<end_of_turn>\n<start_of_turn>model\n"
LATER = "<start_of_turn>user\nAnd now?<end_of_turn>\n<start_of_turn>model\n⟦It sleeps.<end_of_turn>⟧\n"
CASES = {
    "two turns": Case(said(SYSTEM, *TURNS), (FIRST + "⟦A fox.<end_of_turn>⟧\n" + LATER,)),
    "each answer": Case(
        said(SYSTEM, *TURNS),
        (FIRST + "⟦A fox.<end_of_turn>⟧\n", FIRST + "A fox.<end_of_turn>\n" + LATER),
        learn="each_answer",
    ),
    "tools": Case(said(*TURNS, tools=TOOLS), refused="the chat template does not render all content: its `tools`"),
    "two questions in a row": Case(
        said(TURNS[0], *TURNS), refused="the chat template refuses it: Conversation roles must alternate"
    ),
}
