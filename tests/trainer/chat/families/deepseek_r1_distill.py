"""DeepSeek-R1's distilled models: the generation prompt begins the thoughts, which the template drops from every answer, so that
no answer can be learned with it."""

from tests.trainer.chat.family import TURNS, Case, Family, said

FAMILY = Family(
    special=("<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜User｜>", "<｜Assistant｜>"),
    added=("<think>", "</think>"),
    bos="<｜begin▁of▁sentence｜>",
    eos="<｜end▁of▁sentence｜>",
    begins=True,
)
THOUGHTFUL = said(TURNS[0], {"role": "assistant", "content": "<think>\nRed fur.\n</think>\n\nA fox."})
LOST = "the chat template does not render all content: message 2, of `assistant`"
CHANGED = "with this chat template an answer changes the tokens before it: message 2"
CASES = {
    "thoughts": Case(THOUGHTFUL, refused=LOST),
    "thoughts of the last answer": Case(THOUGHTFUL, learn="last_answer", refused=LOST),
    "no thoughts": Case(said(*TURNS), refused=CHANGED),
    "each answer": Case(said(*TURNS), learn="each_answer", refused=CHANGED),
}
