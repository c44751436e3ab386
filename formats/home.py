"""Expand `~` in paths: shells leave it in `name=~/x`, in `--option=~/x` and in quotes, and nothing expands it in files."""

from __future__ import annotations

import os
import re
from pathlib import Path

from formats.errors import UserError

_BEGIN = re.compile(r"~[^/]*")


def expanded(path: str | Path) -> str:
    """Return `path` with a leading `~` or `~user` replaced by that home directory; other paths and URLs unchanged.

    Raises UserError where no home directory is known.

    >>> expanded("./~/model")
    './~/model'
    """
    text = str(path)
    tilde = _BEGIN.match(text)
    if not tilde:
        return text
    home = os.path.expanduser(tilde[0])  # noqa: PTH111 - Path's raises RuntimeError, and joins unknown names
    if home == tilde[0]:
        whose = f"user `{tilde[0][1:]}`" if tilde[0] != "~" else "this user"
        raise UserError(
            f"`{text}` is in the home directory of {whose}, which does not exist",
            hint=f"give the full path, or `./{text}` for a folder named `{tilde[0]}`",
        )
    return home + text[tilde.end() :]
