"""Parse the command of `mbtrain`, run it, and exit. Each file in `commands/` is a command, imported only when it runs."""

from __future__ import annotations

import pkgutil
import sys
from collections.abc import Sequence
from difflib import get_close_matches
from importlib import import_module
from typing import Any

import click

from converter import streams
from formats.errors import UserError
from trainer import commands


class _Commands(click.Group):
    """List the files of a directory as commands and import one when it is called: importing torch takes seconds."""

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002 - click's signature
        return sorted(module.name.replace("_", "-") for module in pkgutil.iter_modules(commands.__path__))

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in self.list_commands(ctx):
            return None
        command: Any = import_module(f"{commands.__name__}.{cmd_name.replace('-', '_')}").command
        return command

    def main(self, *args: Any, **kwargs: Any) -> Any:
        """Run the program; each process of a run calls this too."""
        streams.prepare()
        return super().main(*args, **kwargs)

    def resolve_command(self, ctx: click.Context, args: list[str]) -> tuple[str | None, click.Command | None, list[str]]:
        """Suggest the nearest command for an unknown one. Keeps the arguments for an error about one of them."""
        ctx.meta[_WORDS] = tuple(args)
        near = get_close_matches(args[0], self.list_commands(ctx), 1)
        if args[0] not in self.list_commands(ctx) and near:
            raise click.UsageError(f"there is no command `{args[0]}`; did you mean `{near[0]}`?", ctx)
        return super().resolve_command(ctx, args)

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except click.NoSuchOption as error:
            if meant := _meant(error.option_name, ctx.meta.get(_WORDS, ())):
                raise click.UsageError(f"there is no option `{error.option_name}`; write `{meant}`", error.ctx) from error
            raise
        except UserError as error:
            if not getattr(error, "told", False):
                click.echo(f"error: {error}", err=True)
            sys.exit(1)


_WORDS = f"{__name__}.words"


def _meant(option: str, words: Sequence[str]) -> str | None:
    from trainer import flags  # noqa: PLC0415 - brings torch

    return flags.setting(option, words)


@click.command(cls=_Commands)
@click.version_option(package_name="mbtools")
def main() -> None:
    """Train language models with megatron-core."""
    import_module("trainer.warnings_filter")
