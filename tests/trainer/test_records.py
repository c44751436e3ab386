"""`metrics.jsonl`, read back by Python's json."""

from __future__ import annotations

import json
import math
from dataclasses import asdict

import pytest

from formats.errors import UserError
from tests.trainer.test_metrics import step
from trainer.logging.records import FILE, JsonLines, read_records


def write(folder, iterations, *, done: int = 0, **changes) -> list[str]:
    sink = JsonLines(folder / FILE, done=done)
    for iteration in iterations:
        sink.log(step(iteration=iteration, **changes))
    sink.close()
    return (folder / FILE).read_text().splitlines()


def test_a_line_has_every_field_to_the_last_bit(tmp_path):
    record = step(loss=0.1 + 0.2, lr=1 / 3, grad_norm=5e-324)
    sink = JsonLines(tmp_path / FILE)
    sink.log(record)
    line = json.loads((tmp_path / FILE).read_text())  # before it is closed: lines are flushed
    sink.close()
    assert line == {"kind": "step", **asdict(record)}


def test_numbers_without_digits_are_strings_that_float_reads(tmp_path):
    [line] = write(tmp_path, [1], loss=math.nan, grad_norm=-math.inf)
    fields = json.loads(line, parse_constant=pytest.fail)
    assert (fields["loss"], fields["grad_norm"]) == ("NaN", "-Infinity")
    [record] = read_records(tmp_path / FILE)
    assert math.isnan(record["loss"])
    assert record["grad_norm"] == -math.inf


def test_a_resumed_run_replaces_the_killed_runs_later_lines(tmp_path, capsys):
    straight = write(tmp_path / "straight", range(10, 60, 10))
    write(tmp_path / "killed", range(10, 50, 10))
    with (tmp_path / "killed" / FILE).open("a") as file:
        file.write('{"kind": "st')  # killed while it wrote
    assert write(tmp_path / "killed", [30, 40, 50], done=20) == straight
    output = capsys.readouterr().err
    assert output == f"note: {tmp_path / 'killed' / FILE}: 3 lines of steps after 20 dropped; they are computed again\n"


def test_a_resume_with_nothing_to_drop_says_nothing(tmp_path, capsys):
    write(tmp_path, [10, 20])
    assert len(write(tmp_path, [30], done=20)) == 3
    assert capsys.readouterr().err == ""


def test_a_run_that_starts_anew_keeps_the_lines_of_those_before(tmp_path, capsys):
    first = write(tmp_path, [10, 20])
    second = write(tmp_path, [10], loss=3.0)
    assert len(write(tmp_path, [])) == 0
    assert (tmp_path / "metrics-1.jsonl").read_text().splitlines() == first
    assert (tmp_path / "metrics-2.jsonl").read_text().splitlines() == second
    assert capsys.readouterr().err.splitlines() == [
        f"note: {tmp_path / FILE} was of an earlier run, and is metrics-{number}.jsonl now" for number in (1, 2)
    ]


def test_a_line_that_is_no_record_is_named(tmp_path):
    lines = write(tmp_path, [1, 2])
    (tmp_path / FILE).write_text(f"{lines[0]}\nnonsense\n{lines[1]}\n")
    with pytest.raises(UserError) as caught:
        JsonLines(tmp_path / FILE, done=1)
    assert str(caught.value) == (
        f"`{tmp_path / FILE}`, line 2: `nonsense` is not a record of a run\n\nhint: remove the line, or choose another folder"
    )
