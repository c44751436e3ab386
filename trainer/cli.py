"""`mbtrain`: arguments in, exit code out. Each file under `commands/` is a command; this lists them without importing them."""

from __future__ import annotations

import pkgutil
import sys
from importlib import import_module
from typing import Any

import click

from converter import streams
from formats.errors import UserError
from trainer import commands


class _Commands(click.Group):
    """The files of a directory as commands, imported when they are called: torch alone takes seconds."""

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002 - click's signature
        return sorted(module.name.replace("_", "-") for module in pkgutil.iter_modules(commands.__path__))

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in self.list_commands(ctx):
            return None
        command: Any = import_module(f"{commands.__name__}.{cmd_name.replace('-', '_')}").command
        return command

    def main(self, *args: Any, **kwargs: Any) -> Any:
        """The program; also each process of a run."""
        streams.prepare()
        return super().main(*args, **kwargs)

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except UserError as error:
            if not getattr(error, "told", False):
                click.echo(f"error: {error}", err=True)
            sys.exit(1)


@click.command(cls=_Commands)
@click.version_option(package_name="mbtools")
def main() -> None:
    """Train language models with megatron-core."""
    import_module("trainer.quiet")
