"""What `--help` shows: a summary of every command that fits its line, and an example that the command accepts."""

from __future__ import annotations

import shlex

import click
import pytest
from click.testing import CliRunner

from converter.cli import cli as mbconvert
from trainer.cli import main as mbtrain

PROGRAMS = {"mbconvert": mbconvert, "mbtrain": mbtrain}


def _commands() -> list[tuple[str, str]]:
    return [(program, name) for program, group in PROGRAMS.items() for name in group.list_commands(click.Context(group))]


def _command(program: str, name: str) -> click.Command:
    group = PROGRAMS[program]
    command = group.get_command(click.Context(group), name)
    assert command
    return command


@pytest.mark.parametrize("program", PROGRAMS)
def test_no_summary_of_a_command_is_cut(program):
    shown = CliRunner().invoke(PROGRAMS[program], ["--help"], terminal_width=80).output
    listed = shown.split("Commands:\n")[1].splitlines()
    assert [line.split()[0] for line in listed] == [name for of, name in _commands() if of == program]
    assert [line for line in listed if not line.endswith(".") or line.endswith("...")] == []


@pytest.mark.parametrize(("program", "name"), _commands())
def test_the_help_of_a_command_has_an_example_that_it_accepts(program, name):
    command = _command(program, name)
    shown = " ".join(CliRunner().invoke(command, ["--help"]).output.split())
    example = shlex.split(shown.split("Example: ")[1])
    assert example[:2] == [program, name]
    command.make_context(name, example[2:])
