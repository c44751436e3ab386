"""Check that this machine is supported."""

from __future__ import annotations

import sys

from formats.errors import UserError


def check_machine() -> None:
    """Raise UserError on big-endian machines and on Windows, where `pread` and `pwrite` are missing."""
    if sys.byteorder != "little":
        raise UserError(
            f"this machine stores numbers {sys.byteorder}-endian, checkpoints hold them little-endian",
            hint="convert on another machine, x86-64 or ARM",
        )
    if sys.platform == "win32":
        raise UserError(
            "`win32` is not supported: reads and writes at positions (`pread`, `pwrite`) are missing on Windows",
            hint="use the Windows Subsystem for Linux, or another machine",
        )
