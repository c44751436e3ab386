"""Standard streams that are closed (`>&-`), whose reader goes away (`| head -1`) or that are full do not break what a command
does: its work is finished, and its exit code tells of that work.

Used by `mbconvert` and `mbtrain`. Knows nothing of what is written.
"""

from __future__ import annotations

import io
import os
import sys
from typing import Any, TextIO

from formats.errors import UserError

_STDOUT, _STDERR = 1, 2


class _Descriptor(io.FileIO):
    """A descriptor to write to. What nobody reads any more goes nowhere; so does what standard error has no room for. What
    standard output, the result, has no room for is an error."""

    def write(self, data: Any, /) -> int:
        try:
            return super().write(data)
        except OSError as error:
            self._leads_nowhere()  # else what is buffered would be tried again when the process ends
            if not isinstance(error, BrokenPipeError) and self.fileno() == _STDOUT:
                raise UserError(
                    f"cannot write to standard output: {error.strerror}", hint="let it go where there is room"
                ) from error
            return memoryview(data).nbytes

    def _leads_nowhere(self) -> None:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self.fileno())
        os.close(nowhere)


def prepare() -> None:
    """Make this process's standard streams such ones; those that tests put in their place stay."""
    _open_what_is_closed()
    for name, number in (("stdout", _STDOUT), ("stderr", _STDERR)):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8", errors="backslashreplace"))  # noqa: SIM115, PTH123 - for the process's whole life
        elif stream is getattr(sys, f"__{name}__") and _is_descriptor(stream, number):
            setattr(sys, name, _patient(stream, number))
        elif isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _open_what_is_closed() -> None:
    """No file that is opened later may get the number of a standard stream: what is printed would be written into it."""
    for number in (0, _STDOUT, _STDERR):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # gets the lowest number that is free, which is this one


def _is_descriptor(stream: TextIO, number: int) -> bool:
    try:
        return stream.fileno() == number
    except (OSError, ValueError):
        return False


def _patient(stream: TextIO, number: int) -> TextIO:
    """The stream anew. Names in a damaged file may be no text in its encoding: they are escaped."""
    stream.flush()
    descriptor = _Descriptor(number, "wb", closefd=False)
    return io.TextIOWrapper(
        io.BufferedWriter(descriptor),
        encoding=stream.encoding,
        errors="backslashreplace",
        line_buffering=bool(getattr(stream, "line_buffering", False)),
        write_through=number == _STDERR,
    )
