"""DeepSeek-V3: calls have a null content and arguments as JSON; an answer to results of tools has no generation prompt."""

from tests.trainer.chat.family import SYSTEM, TURNS, Case, Family, call, said

MARKS = (
    "calls▁begin",
    "calls▁end",
    "call▁begin",
    "call▁end",
    "sep",
    "outputs▁begin",
    "outputs▁end",
    "output▁begin",
    "output▁end",
)
FAMILY = Family(
    special=("<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜User｜>", "<｜Assistant｜>"),
    added=tuple(f"<｜tool▁{mark}｜>" for mark in MARKS),
    bos="<｜begin▁of▁sentence｜>",
    eos="<｜end▁of▁sentence｜>",
    begins=True,
    openai_calls=True,
)
FIRST = "<｜begin▁of▁sentence｜>Be quick.<｜User｜>What is it?<｜Assistant｜>"
LATER = "<｜User｜>And now?<｜Assistant｜>⟦It sleeps.<｜end▁of▁sentence｜>⟧"
STEPS = [
    {"role": "user", "content": "Weather?"},
    {"role": "assistant", "content": None, "tool_calls": [call("weather", city="Bern"), call("weather", city="Rome")]},
    {"role": "tool", "content": "rain"},
    {"role": "tool", "content": "sun"},
    {"role": "assistant", "content": "Both."},
]
CASES = {
    "two turns": Case(said(SYSTEM, *TURNS), (FIRST + "⟦A fox.<｜end▁of▁sentence｜>⟧" + LATER,)),
    "each answer": Case(
        said(SYSTEM, *TURNS),
        (FIRST + "⟦A fox.<｜end▁of▁sentence｜>⟧", FIRST + "A fox.<｜end▁of▁sentence｜>" + LATER),
        learn="each_answer",
    ),
    "calls": Case(
        said(*STEPS),
        (
            (
                "<｜begin▁of▁sentence｜><｜User｜>Weather?<｜Assistant｜>⟦<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function"
                '<｜tool▁sep｜>weather\n```json\n{"city": "Bern"}\n```<｜tool▁call▁end｜>\n<｜tool▁call▁begin｜>function'
                '<｜tool▁sep｜>weather\n```json\n{"city": "Rome"}\n```<｜tool▁call▁end｜><｜tool▁calls▁end｜>'
                "<｜end▁of▁sentence｜>⟧"
                "<｜tool▁outputs▁begin｜><｜tool▁output▁begin｜>rain<｜tool▁output▁end｜><｜tool▁output▁begin｜>sun"
                "<｜tool▁output▁end｜><｜tool▁outputs▁end｜>⟦Both.<｜end▁of▁sentence｜>⟧"
            ),
        ),
    ),
}
