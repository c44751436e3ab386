"""Start `mbconvert` and `mbtrain`, after checking that `formats`, `converter` and `trainer` are this installation's.

The three names are common words. A folder on `PYTHONPATH`, the current folder under `python -m`, or another distribution may
hold a module of the same name. This module has the name of the distribution, and imports none of them before the check.
"""

from __future__ import annotations

import os
import sys
from importlib import import_module
from importlib.util import find_spec

DISTRIBUTION = "mbtools"


class ForeignPackageError(ImportError):
    """Python would import another module, or has imported one, under the name of one of our packages."""


def check_packages(*names: str) -> None:
    """Raise ForeignPackageError unless these packages are the ones installed beside this file.

    A module elsewhere is found before it is imported, so none of its code runs. A package in our place that another
    distribution has overwritten is recognised after the import: its `DISTRIBUTION` is missing.
    """
    for name in names:
        expected = os.path.join(os.path.dirname(os.path.realpath(__file__)), name)  # noqa: PTH118, PTH120 - pathlib takes longer
        spec = find_spec(name)
        location = (spec.origin or next(iter(spec.submodule_search_locations or ()), "")) if spec else ""
        if os.path.realpath(location) != os.path.join(expected, "__init__.py"):  # noqa: PTH118
            raise ForeignPackageError(
                f"`{name}` is `{location}`, which is not part of {DISTRIBUTION}: its own is in `{expected}`\n\n"
                "hint: rename that file or folder, or remove its folder from `PYTHONPATH`; `python -m` and `torchrun -m` "
                "search the current folder first; `mbconvert`, `mbtrain` and `torchrun --no-python mbconvert` do not"
            )
        if getattr(import_module(name), "DISTRIBUTION", None) != DISTRIBUTION:
            raise ForeignPackageError(
                f"`{expected}` was overwritten by another distribution that has a package `{name}`\n\n"
                f"hint: `pip install --force-reinstall --no-deps {DISTRIBUTION}`, in an environment without that distribution"
            )


def mbconvert() -> None:
    """Run `mbconvert` with the arguments of this process."""
    _start("converter", needs=("formats",))


def mbtrain() -> None:
    """Run `mbtrain` with the arguments of this process."""
    _start("trainer", needs=("formats", "converter"))


def _start(package: str, *, needs: tuple[str, ...]) -> None:
    try:
        check_packages(*needs, package)
    except ForeignPackageError as error:
        sys.exit(f"error: {error}")
    import_module(f"{package}.cli").main()
