"""Gemma 1 and 2: the assistant is `model`, and there is no system prompt."""

from tests.trainer.chat.family import ASKED, SYSTEM, TOOLS, TURNS, Case, Family, said

FAMILY = Family(
    special=("<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>"), bos="<bos>", eos="<eos>", pieces="spaces", begins=True
)
FIRST = "<bos><start_of_turn>user\nWhat is it?<end_of_turn>\n<start_of_turn>model\n"
BOTH = (
    FIRST + "⟦A fox.<end_of_turn>⟧\n<start_of_turn>user\nAnd now?<end_of_turn>\n<start_of_turn>model\n⟦It sleeps.<end_of_turn>⟧\n"
)
CASES = {
    "two turns": Case(said(*TURNS), (BOTH,)),
    "white space around an answer": Case(
        said(ASKED, {"role": "assistant", "content": "\n A fox. \n"}), (FIRST + "⟦A fox.<end_of_turn>⟧\n",)
    ),
    "answers under the name of the template": Case(
        said(*({**turn, "role": {"assistant": "model"}.get(turn["role"], turn["role"])} for turn in TURNS)), (BOTH,)
    ),
    "last answer": Case(said(*TURNS), (BOTH.replace("⟦A fox.<end_of_turn>⟧", "A fox.<end_of_turn>"),), learn="last_answer"),
    "system": Case(said(SYSTEM, *TURNS), refused="the chat template refuses it: System role not supported"),
    "tools": Case(said(*TURNS, tools=TOOLS), refused="the chat template does not render all content: its `tools`"),
}
