"""Every package that the sources import is one that `pip install` brings: with the base, or with the extra of the feature."""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
OURS = {"formats", "converter", "trainer"}

PACKAGES = {
    "yaml": "PyYAML", "megatron": "megatron-core", "hydra": "hydra-core", "google": "google-auth[requests]",
    "requests": "google-auth[requests]", "nemo_run": "nemo-run", "transformer_engine": "transformer-engine[pytorch]",
}  # fmt: skip
"""Packages that are not called as what they bring."""

COMES_WITH = {
    "omegaconf": "hydra-core", "jinja2": "transformers", "sentencepiece": None, "tiktoken": None,
    "emerging_optimizers": None,
}  # fmt: skip
"""What another package brings, or what no extra of ours promises and an error names."""

FEATURES = {
    "converter": (),
    "formats": (),
    "formats/remote/s3.py": ("remote",),
    "formats/remote/gcs.py": ("remote",),
    "formats/remote/store.py": ("remote",),
    "formats/zarr_compressed.py": ("zarr",),
    "trainer": ("train",),
    "trainer/data/records.py": ("train", "datasets"),
    "trainer/logging/writers.py": ("train", "wandb"),
    "trainer/launch/nemo.py": ("train", "nemo-run"),
    "trainer/checkpoints/fp8_states.py": ("train", "gpu"),
    "trainer/device.py": ("train", "gpu"),
    "trainer/layers/scores.py": ("train", "gpu"),
    "trainer/settings/kernels.py": ("train", "gpu"),
    "trainer/user_buffers.py": ("train", "gpu"),
}
"""Which extras whoever uses a part has installed; the longest path that a file begins with counts."""

ASKED_LATER = {
    ("train", "psutil"): "megatron-core's writer asks for it when it writes (`_process_memory` in its `filesystem_async.py`)",
    ("train", "tensorboard"): "torch's SummaryWriter",
    ("train", "safetensors"): "transformers",
}
"""What nobody imports by name here, and what needs it."""


def name_of(requirement: str) -> str:
    return re.split(r"[<>=!~;\s]", requirement, maxsplit=1)[0].lower()


def installed(extras: tuple[str, ...]) -> set[str]:
    """The packages of the base and of some extras."""
    optional = PROJECT["optional-dependencies"]
    return {
        name_of(requirement)
        for requirement in (*PROJECT["dependencies"], *(requirement for extra in extras for requirement in optional[extra]))
    }


def imported(path: Path) -> Iterator[str]:
    """The top-level modules that a file imports or looks for, wherever in it."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node.module
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if called in ("import_module", "find_spec", "optional_import") and isinstance(node.args[0].value, str):
                yield node.args[0].value


def extras_of(path: Path) -> tuple[str, ...]:
    file = str(path.relative_to(ROOT))
    return FEATURES[max((feature for feature in FEATURES if file == feature or file.startswith(f"{feature}/")), key=len)]


@pytest.mark.parametrize("room", sorted(OURS))
def test_what_is_imported_is_installed_with_the_feature_that_needs_it(room: str) -> None:
    lacking: set[tuple[str, str]] = set()
    for path in (ROOT / room).rglob("*.py"):
        for module in {name.partition(".")[0] for name in imported(path)} - OURS - {"mbtools"} - sys.stdlib_module_names:
            package = PACKAGES.get(module, COMES_WITH.get(module, module))
            if package is not None and package.lower() not in installed(extras_of(path)):
                lacking.add((str(path.relative_to(ROOT)), module))
    assert not lacking


def test_what_others_ask_for_later_is_installed() -> None:
    assert {(extra, package) for extra, package in ASKED_LATER if package not in installed((extra,))} == set()


def test_what_the_tests_install_is_no_more_than_they_say() -> None:
    """A package that a feature needs and the tests alone install hides that the feature lacks it."""
    own = {name_of(requirement) for requirement in PROJECT["optional-dependencies"]["test"]}
    needed = {name for path in (ROOT / room for room in OURS) for file in path.rglob("*.py") for name in imported(file)}
    assert own.isdisjoint(PACKAGES.get(name.partition(".")[0], name.partition(".")[0]).lower() for name in needed)
