"""Call `mbtrain launch`, and words that a shell would change."""

from __future__ import annotations

from click.testing import CliRunner

from trainer.commands.launch import command

AWKWARD = ("a=b c", "list=[1,2]", "quote='", 'double="$HOME" `id` \\', "star=*", "+new=1", "~gone", "é=ü", "two\nlines", "")


def invoke(*words: str):
    return CliRunner().invoke(command, list(words), catch_exceptions=False)
