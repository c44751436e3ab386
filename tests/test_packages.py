"""`formats`, `converter` and `trainer` are the installation's own, and carry their types."""

from __future__ import annotations

import builtins
import os
import shutil
import subprocess
import sys
import zipfile
from importlib.resources import files
from pathlib import Path

import pytest

import converter

ROOT = Path(__file__).parents[1]
PACKAGES = ("formats", "converter", "trainer")


def run(code: str, path: Path | str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Run Python code with a `PYTHONPATH` and without the current folder on `sys.path`, as a console script runs."""
    env = {**os.environ, "PYTHONPATH": str(path), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-P", "-c", code, "--help"]
    return subprocess.run(command, capture_output=True, text=True, env=env, cwd=cwd, check=False)


MBCONVERT, MBTRAIN = "from mbtools import mbconvert; mbconvert()", "from mbtools import mbtrain; mbtrain()"
SHOUTS = "print('this file ran')"


@pytest.fixture
def others(tmp_path):
    """A folder for modules of somebody else."""
    (tmp_path / "others").mkdir()
    return tmp_path / "others"


def _refusal(name: str, location: Path) -> str:
    return (
        f"error: `{name}` is `{location}`, which is not part of mbtools: its own is in `{ROOT / name}`\n\nhint: rename that file"
    )


@pytest.mark.parametrize(
    ("file", "program"),
    [
        ("converter.py", MBCONVERT), ("converter/__init__.py", MBCONVERT), ("formats.py", MBCONVERT),
        ("formats/__init__.py", MBCONVERT), ("formats/__init__.py", MBTRAIN), ("converter.py", MBTRAIN), ("trainer.py", MBTRAIN),
    ],
)  # fmt: skip
def test_a_module_of_another_folder_with_such_a_name_is_named_and_not_run(file, program, others):
    (others / file).parent.mkdir(exist_ok=True)
    (others / file).write_text(SHOUTS)
    done = run(program, f"{others}{os.pathsep}{ROOT}")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith(_refusal(Path(file).parts[0].removesuffix(".py"), others / file))


def test_a_folder_without_python_files_is_in_nobodys_way(others):
    for name in PACKAGES:
        (others / name).mkdir()
    done = run(MBCONVERT, f"{others}{os.pathsep}{ROOT}")
    assert (done.returncode, done.stderr) == (0, "")


def test_python_m_converter_beside_a_folder_called_formats_says_what_is_wrong(others):
    (others / "formats").mkdir()
    (others / "formats" / "__init__.py").write_text(SHOUTS)
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "converter", "--help"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=others, env=env, check=False)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith(_refusal("formats", others / "formats" / "__init__.py"))
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("name", ["converter", "trainer"])
def test_the_python_api_says_so_too(name, others):
    (others / "formats").mkdir()
    (others / "formats" / "__init__.py").write_text(SHOUTS)
    member = {"converter": "hf_to_mcore", "trainer": "pretrain"}[name]
    done = run(f"from {name} import {member}", f"{others}{os.pathsep}{ROOT}")
    assert (done.returncode, done.stdout) == (1, "")
    assert f"mbtools.ForeignPackageError: `formats` is `{others / 'formats' / '__init__.py'}`" in done.stderr


@pytest.mark.parametrize("name", PACKAGES)
def test_a_package_that_another_distribution_has_overwritten_is_recognised(name, tmp_path):
    site = tmp_path / "site"
    for package in PACKAGES:
        shutil.copytree(ROOT / package, site / package, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "mbtools.py", site)
    assert run(MBTRAIN if name == "trainer" else MBCONVERT, site).returncode == 0
    (site / name / "__init__.py").write_text('"""Convert units."""\n')
    done = run(MBTRAIN if name == "trainer" else MBCONVERT, site)
    assert done.returncode == 1
    assert done.stderr == (
        f"error: `{site / name}` was overwritten by another distribution that has a package `{name}`\n\n"
        "hint: `pip install --force-reinstall --no-deps mbtools`, in an environment without that distribution\n"
    )


def test_python_m_converter_runs_a_users_own_converter_py(others):
    """As `torchrun -m converter` does: under `-m` the current folder comes first. docs/scaling.md says what to do."""
    (others / "converter.py").write_text(SHOUTS)
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-m", "converter"], capture_output=True, text=True, cwd=others, env=env, check=False)
    assert done.stdout == "this file ran\n"


def test_torchrun_without_python_runs_mbconvert_beside_a_users_own_converter_py(others, tmp_path, model_folder):
    (others / "converter.py").write_text(SHOUTS)
    script = tmp_path / "bin" / "mbconvert"
    script.parent.mkdir()
    script.write_text(f"#!{sys.executable}\n{MBCONVERT}\n")
    script.chmod(0o755)
    torchrun = [sys.executable, "-P", "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    env = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "PATH": f"{script.parent}{os.pathsep}{os.environ['PATH']}",
        "OMP_NUM_THREADS": "1",
    }
    arguments = ["hf-to-mcore", str(model_folder("gqa")), str(tmp_path / "m")]
    command = [*torchrun, "--no-python", "mbconvert", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, cwd=others, env=env, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("done: 27 tensors") == 1


@pytest.mark.slow
def test_the_processes_of_mbtrain_do_not_run_a_users_own_trainer_py(others):
    (others / "trainer.py").write_text(SHOUTS)
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    words = [
        "pretrain",
        "llama_tiny",
        "--nproc",
        "2",
        "train.train_iters=1",
        "train.micro_batch_size=4",
        "validation.eval_iters=0",
    ]
    command = [sys.executable, "-P", "-c", MBTRAIN, *words]
    done = subprocess.run(command, capture_output=True, text=True, cwd=others, env=env, check=False, timeout=600)
    assert done.returncode == 0, done.stderr
    assert SHOUTS.split("'")[1] not in done.stdout
    assert "step 1" in done.stderr


def test_the_three_packages_carry_their_types():
    assert [name for name in PACKAGES if not (files(name) / "py.typed").is_file()] == []


def test_a_wheel_holds_the_types_and_the_module_that_starts_the_programs(tmp_path):
    source = tmp_path / "source"
    for package in PACKAGES:
        shutil.copytree(ROOT / package, source / package, ignore=shutil.ignore_patterns("__pycache__"))
    for file in ("mbtools.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / file, source)
    build = f"from setuptools.build_meta import build_wheel; print(build_wheel({str(tmp_path)!r}))"
    done = subprocess.run([sys.executable, "-c", build], capture_output=True, text=True, cwd=source, check=True)
    with zipfile.ZipFile(tmp_path / done.stdout.splitlines()[-1]) as wheel:
        assert {"mbtools.py", *(f"{name}/py.typed" for name in PACKAGES)} <= set(wheel.namelist())
        (scripts,) = (wheel.read(name).decode() for name in wheel.namelist() if name.endswith("entry_points.txt"))
    assert {"mbconvert = mbtools:mbconvert", "mbtrain = mbtools:mbtrain"} <= set(scripts.splitlines())


def test_a_star_import_shadows_nothing():
    names = set(converter.__all__)
    assert not names & (set(dir(builtins)) | sys.stdlib_module_names)
    assert not names & {"check", "inspect", "merge", "verify"}


def test_the_former_names_of_functions_still_work():
    from converter import check, inspect, merge, verify

    present = (converter.check_checkpoint, converter.inspect_checkpoint, converter.merge_adapter, converter.verify_checkpoints)
    assert (check, inspect, merge, verify) == present


@pytest.mark.parametrize(
    ("name", "former", "present"),
    [
        ("hf_to_mcore", "vocab_divisible_by", "make_vocab_size_divisible_by"),
        ("hf_to_mcore", "tensor_model_parallel_size", "tp"),
        ("merge_adapter", "any_base", "allow_other_base"),
        ("merge_adapter", "pipeline_model_parallel_size", "pp"),
        ("verify_checkpoints", "cast", "cast_to"),
    ],
)
def test_another_name_of_an_argument_is_answered_with_the_name_to_write(name, former, present):
    with pytest.raises(TypeError, match=f"has no argument `{former}`; write `{present}`$"):
        getattr(converter, name)("a", "b", **{former: 2})


def test_every_public_name_is_there():
    assert all(getattr(converter, name) for name in converter.__all__)
    assert set(converter.__all__) <= set(dir(converter))
    with pytest.raises(AttributeError, match="module `converter` has no attribute `nothing`"):
        _ = converter.nothing
