"""What a command imports: nothing that it does not use, since those imports took longer than a small conversion."""

from __future__ import annotations

import json
import subprocess
import sys

_PROGRAM = """
import contextlib, io, json, sys
from converter.cli import cli

def imported_by(*arguments):
    with contextlib.redirect_stdout(io.StringIO()):
        cli.main(arguments, standalone_mode=False)
    return sorted(sys.modules)

source, checkpoint, made = sys.argv[1:]
print(json.dumps([
    imported_by("--help"),
    imported_by("families"),
    imported_by("inspect", source),
    imported_by("mcore-to-hf", checkpoint, made, "--dry-run"),
    imported_by("hf-to-mcore", source, made, "--verify"),
]))
"""

_OF_URLS = ("formats.remote", "http", "ssl", "email", "botocore", "google", "requests", "huggingface_hub")
_OF_ADAPTERS = (
    "converter.adapters.adapter",
    "converter.adapters.megatron",
    "converter.adapters.peft",
    "converter.adapters.merge",
)
_OF_OTHERS = ("rich", "importlib.metadata", "converter.proof", "numpy.ma")


def test_a_command_imports_only_what_it_uses(model_folder, checkpoint, tmp_path):
    paths = [model_folder("gqa", dtype="bfloat16"), checkpoint, tmp_path / "made"]
    done = subprocess.run([sys.executable, "-c", _PROGRAM, *map(str, paths)], capture_output=True, text=True, check=True)
    help_, families, inspect, planned, converted = (set(names) for names in json.loads(done.stdout))
    assert not {"numpy", "yaml", "blake3", "converter.families"} & help_
    assert not {"yaml", "blake3", "converter.conversion_plan", "converter.execute"} & families
    assert not {"converter.conversion_plan", "converter.execute", "converter.worker"} & inspect
    for names in (help_, families, inspect, planned, converted):
        late = [
            name
            for name in names
            if f"{name}.".startswith(tuple(f"{module}." for module in _OF_URLS + _OF_ADAPTERS + _OF_OTHERS))
        ]
        assert not late


def test_the_check_of_the_packages_imports_nothing_of_them():
    program = "import json, sys, mbtools; mbtools.check_packages('formats', 'converter'); print(json.dumps(sorted(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    imported = set(json.loads(done.stdout))
    assert {name for name in imported if name.partition(".")[0] in ("formats", "converter", "trainer")} == {
        "formats",
        "converter",
    }
    assert not {"click", "numpy", "importlib.metadata", "pathlib"} & (imported - _imported_by_python())


def _imported_by_python() -> set[str]:
    program = "import json, sys; print(json.dumps(sorted(sys.modules)))"
    return set(json.loads(subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout))
