"""`mbtrain generate`."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from formats.errors import UserError
from formats.faults import fault
from formats.home import expanded
from trainer.arguments import HomePath, num_processes

if TYPE_CHECKING:
    from trainer.generation.text import Generation


@click.command(epilog="Example: mbtrain generate run --prompt 'def main('")
@click.argument("checkpoint")
@click.argument("overrides", nargs=-1, metavar="[SECTION.NAME=VALUE]...")
@click.option("--prompt", "prompts", multiple=True, metavar="TEXT", help="May be given several times.")
@click.option(
    "--prompt-file",
    type=HomePath(exists=True, dir_okay=False, allow_dash=True),
    help="A prompt on each line that is not empty; `-` reads standard input.",
)
@click.option("--max-new-tokens", type=click.IntRange(1), default=64, show_default=True)
@click.option("--temperature", type=float, default=0.0, show_default=True, help="0 takes the likeliest token each time.")
@click.option("--top-k", type=int, help="Sample among so many of the likeliest tokens.")
@click.option("--top-p", type=float, help="Sample among the fewest tokens with this much of the probability.")
@click.option("--seed", type=int, default=1234, show_default=True, help="Of the first prompt; the next one has the next.")
@click.option("--dtype", type=click.Choice(["fp32", "bf16", "fp16"]), help="fp32 on the CPU, else the checkpoint's.")
@num_processes
@click.option("--json", "as_json", is_flag=True, help="A JSON object on a line for each prompt.")
def command(
    checkpoint: str,
    overrides: tuple[str, ...],
    prompts: tuple[str, ...],
    prompt_file: Path | str | None,
    *,
    max_new_tokens: int,
    dtype: str | None,
    nproc: int | None,
    as_json: bool,
    **sampling: Any,
) -> None:
    """Generate text from prompts.

    CHECKPOINT is a Megatron checkpoint or a Hugging Face directory; settings such as model.tensor_model_parallel_size=2 divide
    the model over --nproc processes, or over those that torchrun starts.
    """
    if not prompts and prompt_file is None:
        raise UserError("there is no prompt", hint="give one with `--prompt TEXT`, or several with `--prompt-file FILE`")
    from trainer import launching, parallel  # noqa: PLC0415 - seconds to import
    from trainer.generation import checkpoint as generation  # noqa: PLC0415
    from trainer.generation.sampling import Sampling  # noqa: PLC0415

    how, checkpoint = Sampling(**sampling), expanded(checkpoint)
    starts = parallel.starts_others(nproc)
    settings = generation.make_run(
        checkpoint, overrides, world_size=nproc if starts and nproc else parallel.world_size(), dtype=dtype
    )
    if starts and nproc:
        sys.exit(launching.launch(nproc, sys.argv[1:]))
    streams = len(prompts) == 1 and prompt_file is None and not as_json and sys.stdout.isatty()
    generation.run(
        checkpoint,
        lambda: [*prompts, *_lines(prompt_file)],
        settings=settings,
        max_new_tokens=max_new_tokens,
        sampling=how,
        tell=(lambda text: click.echo(text, nl=False)) if streams else None,
        done=_writer(as_json=as_json, streamed=streams),
    )


def _lines(file: Path | str | None) -> list[str]:
    """Return a file's prompts. One rank reads them, since standard input can be read once."""
    if file is None:
        return []
    import torch.distributed as dist  # noqa: PLC0415

    message: list[Any] = [None]
    if dist.get_rank() == 0:
        message = [sys.stdin.buffer.read() if isinstance(file, str) else file.read_bytes()]
    dist.broadcast_object_list(message, src=0)
    try:
        lines = [line for line in message[0].decode().splitlines() if line.strip()]
    except UnicodeDecodeError as error:
        raise UserError(f"`{file}` is not text in UTF-8: {fault(error)}", hint="save it as UTF-8") from error
    if not lines:
        raise UserError(f"`{file}` has no prompt", hint="write one on each line")
    return lines


def _writer(*, as_json: bool, streamed: bool) -> Callable[[Sequence[Generation], float], None]:
    """Return a function that prints the answers, and how long they took."""

    def write(answers: Sequence[Generation], seconds: float) -> None:
        for answer in answers:
            if as_json:
                click.echo(json.dumps({name: getattr(answer, name) for name in ("prompt", "text", "tokens", "finished")}))
            elif len(answers) > 1:
                click.echo(f"{answer.prompt}{answer.text}\n")
            else:
                click.echo("" if streamed else answer.text)
        count = sum(len(answer.tokens) for answer in answers)
        click.echo(f"{count} tokens in {seconds:.1f} s, {count / seconds:.1f} tokens/s", err=True)

    return write
