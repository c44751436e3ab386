"""`~` in paths: shells leave it as it is in `name=~/x`, in `--option=~/x` and in quotes, and files are no shells."""

from __future__ import annotations

import os
import re
from pathlib import Path

from formats.errors import UserError

_BEGIN = re.compile(r"~[^/]*")


def expanded(path: str | Path) -> str:
    """Return `path` with the `~` or `~user` that it begins with as that home directory; any other path, or URL, as it is.

    UserError where no home directory is known.

    >>> expanded("./~/model")
    './~/model'
    """
    text = str(path)
    found = _BEGIN.match(text)
    if not found:
        return text
    home = os.path.expanduser(found[0])  # noqa: PTH111 - Path's raises RuntimeError, and joins names that are none
    if home == found[0]:
        whose = f"user `{found[0][1:]}`" if found[0] != "~" else "this user"
        raise UserError(
            f"`{text}` is in the home directory of {whose}, and there is none",
            hint=f"give the whole path, or `./{text}` for what is called `{found[0]}` here",
        )
    return home + text[found.end() :]
