"""Curves from `metrics.jsonl`."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from formats.errors import UserError
from tests.trainer.test_metrics import step
from trainer.commands.plot import command
from trainer.logging.plot import plot
from trainer.logging.records import FILE, JsonLines, evaluation


def made(folder: Path, *, steps: int = 40, floor: float = 2.0, lr: float = 3e-4, rate: float = 12_000) -> Path:
    sink = JsonLines(folder / FILE)
    for number in range(10, 10 * steps + 1, 10):
        fall = math.exp(-number / 100)
        sink.log(
            step(
                iteration=number,
                loss=floor + 8 * fall + 0.05 * math.sin(number),
                lr=lr * min(number / 50, 1) * (1 - number / (12 * steps)),
                grad_norm=0.5 + 4 * fall,
                tokens_per_second_per_gpu=rate + 200 * math.sin(number / 7),
            )
        )
        if number % 100 == 0:
            sink.log(evaluation(number, split="validation", loss=floor + 0.1 + 8 * fall))
    sink.close()
    return folder


def test_several_runs_are_one_png(tmp_path):
    from matplotlib.image import imread

    runs = [made(tmp_path / "a" / "run"), made(tmp_path / "b" / "run", floor=2.5), made(tmp_path / "one", steps=1)]
    out = tmp_path / "made" / "curves.png"
    plot(runs, out)
    assert imread(out).shape == (1040, 1560, 4)


def test_each_held_out_set_is_drawn(tmp_path):
    from matplotlib import figure

    from trainer.logging import plot as module

    sink = JsonLines(tmp_path / FILE)
    for split in ("test/a", "validation/a", "validation/b", "test/b"):
        sink.log(evaluation(1, split=split, loss=2.0))
    sink.close()
    drawn = figure.Figure()
    module._draw(drawn, {"run": [json.loads(line) for line in (tmp_path / FILE).read_text().splitlines()]})
    labels = [line.get_label() for line in drawn.axes[0].get_lines()]
    assert labels == ["validation/a", "validation/b", "test/a", "test/b"]


def test_the_command_says_where_it_drew(tmp_path):
    run = made(tmp_path / "run")
    result = CliRunner().invoke(command, [str(run)], catch_exceptions=False)
    assert result.output == f"{run / 'curves.png'}\n"
    assert (run / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_drawing_does_not_wait_for_torch():
    modules = ("commands.plot", "commands.launch", "launch.slurm", "launch.nemo", "logging.plot")
    words = "; ".join(f"import trainer.{module}" for module in modules)
    subprocess.run([sys.executable, "-c", f"import sys; {words}; sys.exit('torch' in sys.modules)"], check=True)


def test_a_line_that_a_run_is_writing_is_left_out(tmp_path):
    run = made(tmp_path / "run")
    with (run / FILE).open("a") as file:
        file.write('{"kind": "step", "iter')
    plot([run], tmp_path / "out.png")
    assert (tmp_path / "out.png").exists()


@pytest.mark.parametrize("line", ["nonsense", "[1]", '{"kind": "step"}', '{"kind": "x", "iteration": 1}', '{"iteration": "1"}'])
def test_a_malformed_line_is_named(tmp_path, line):
    run = made(tmp_path / "run", steps=2)
    with (run / FILE).open("a") as file:
        file.write(line + "\n")
    with pytest.raises(UserError) as caught:
        plot([run], tmp_path / "out.png")
    assert str(caught.value) == (
        f"`{run / FILE}`, line 3: `{line}` is not a record of a run\n\nhint: remove the line, or choose another folder"
    )


def test_a_folder_without_records_is_an_error(tmp_path):
    with pytest.raises(UserError, match=f"`{tmp_path}` has no `metrics.jsonl`"):
        plot([tmp_path], tmp_path / "out.png")
    (tmp_path / FILE).touch()
    with pytest.raises(UserError, match="has no records yet"):
        plot([tmp_path], tmp_path / "out.png")


def test_a_run_given_twice_is_an_error(tmp_path):
    run = made(tmp_path / "run", steps=2)
    with pytest.raises(UserError, match="a run is given twice"):
        plot([run, run], tmp_path / "out.png")
