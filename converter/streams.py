"""Make standard streams safe to write to when they are closed (`>&-`), their reader has exited (`| head -1`) or they are full.

A command then still finishes its work, and its exit code is that of the work. Used by `mbconvert` and `mbtrain`.
"""

from __future__ import annotations

import io
import os
import sys
from typing import Any, TextIO

from formats.errors import UserError

_STDOUT, _STDERR = 1, 2


class _Descriptor(io.FileIO):
    """A descriptor that drops what can no longer be written.

    A pipe without a reader is dropped on both streams, a full disk on standard error alone: standard output carries the
    result, so there a full disk raises UserError.
    """

    def write(self, data: Any, /) -> int:
        try:
            return super().write(data)
        except OSError as error:
            self._discard()  # else what is buffered would be written again when the process ends
            if not isinstance(error, BrokenPipeError) and self.fileno() == _STDOUT:
                raise UserError(
                    f"cannot write to standard output: {error.strerror}", hint="redirect it to a disk with room"
                ) from error
            return memoryview(data).nbytes

    def _discard(self) -> None:
        """Redirect the descriptor to the null device."""
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, self.fileno())
        os.close(null)


def prepare() -> None:
    """Replace this process's standard streams by safe ones. Streams that a test has substituted are kept."""
    _open_closed_descriptors()
    for name, number in (("stdout", _STDOUT), ("stderr", _STDERR)):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8", errors="backslashreplace"))  # noqa: SIM115, PTH123 - for the process's whole life
        elif stream is getattr(sys, f"__{name}__") and _is_descriptor(stream, number):
            setattr(sys, name, _safe(stream, number))
        elif isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _open_closed_descriptors() -> None:
    """Open the null device on standard descriptors that are closed.

    A file that is opened later would get such a number, and what is printed would be written into it.
    """
    for number in (0, _STDOUT, _STDERR):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # gets the lowest free number, which is this one


def _is_descriptor(stream: TextIO, number: int) -> bool:
    try:
        return stream.fileno() == number
    except (OSError, ValueError):
        return False


def _safe(stream: TextIO, number: int) -> TextIO:
    """Return a new stream on a descriptor. Characters that its encoding lacks, such as in names of damaged files, are escaped."""
    stream.flush()
    descriptor = _Descriptor(number, "wb", closefd=False)
    return io.TextIOWrapper(
        io.BufferedWriter(descriptor),
        encoding=stream.encoding,
        errors="backslashreplace",
        line_buffering=bool(getattr(stream, "line_buffering", False)),
        write_through=number == _STDERR,
    )
