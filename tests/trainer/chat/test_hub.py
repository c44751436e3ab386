"""Data sets of the Hub, fetched by the real `datasets` from a Hub on loopback."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from formats.errors import UserError
from tests.trainer.chat.hub_server import COMMIT, FILES, NAME, ROWS, serving
from trainer.data import hub
from trainer.data.chat.sources import Source

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:datasets", "ignore::ResourceWarning")

ROOT = Path(__file__).parents[3]
TALKS = f"hf://datasets/{NAME}"


def fetched(folder: Path, *sources: str, endpoint: str) -> list[dict]:
    """What a process makes of them."""
    env = {name: value for name, value in os.environ.items() if not name.startswith("HF_") and "proxy" not in name.lower()}
    env |= {"HF_ENDPOINT": endpoint, "HF_HOME": str(folder / "home"), "PYTHONPATH": str(ROOT)}
    words = [sys.executable, "-m", "tests.trainer.chat.hub_server", str(folder / "kept"), *sources]
    done = subprocess.run(words, env=env, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_a_data_set_is_fetched_once_and_stays_what_it_was(tmp_path):
    with serving() as endpoint:
        short, long, nameless, other, missing = fetched(
            tmp_path,
            f"{TALKS}@v1/short",
            f"{TALKS}/long",
            TALKS,
            f"{TALKS}/none",
            "hf://datasets/org/none",
            endpoint=endpoint,
        )
    assert short["splits"] == {"train": ROWS, "test": ROWS[:1]}
    assert short["about"] == {"id": NAME, "revision": COMMIT, "configuration": "short"}
    assert (short["name"], long["name"]) == ("org--talks@v1--short", "org--talks--long")
    assert long["splits"] == {"train": [json.loads(FILES["long.jsonl"])]}
    assert nameless["refused"] == (f"`{TALKS}` has several configurations: `short`, `long`\n\nhint: name one: `{TALKS}/short`")
    assert other["refused"].startswith(f"`{TALKS}/none` has no configuration `none`: it has `short`, `long`")
    assert missing["refused"].startswith(
        "cannot download `hf://datasets/org/none`: `RepositoryNotFoundError`\n\nhint: check the name"
    )
    folder = hub.local_path(f"{TALKS}@v1/short", str(tmp_path / "kept"))  # the Hub is gone
    assert [record.fields() for record in Source(folder, "train").records()] == ROWS
    assert sorted(path.name for path in (tmp_path / "kept").iterdir()) == ["org--talks--long", "org--talks@v1--short"]


@pytest.mark.parametrize("url", ["hf://org/name", "hf://datasets/org", "hf://datasets/org/name@a b", "hf://datasets/org/a/b/c"])
def test_what_is_no_data_set_of_the_hub_says_how_one_looks(url, tmp_path):
    with pytest.raises(UserError) as error:
        hub.local_path(url, str(tmp_path))
    assert str(error.value) == (
        f"`{url}` is not a dataset URL of the Hub\n\nhint: it should look like `hf://datasets/org/name`, "
        "`hf://datasets/org/name@revision` or `hf://datasets/org/name/configuration`"
    )


def test_an_id_that_is_no_path_says_how_the_hub_is_named():
    with pytest.raises(UserError) as error:
        Source(Path("org/name")).files()
    assert error.value.hint.startswith("on the Hub it is `hf://datasets/org/name`; examples are read from ")


def test_without_datasets_it_is_said_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError) as error:
        hub.local_path(TALKS, str(tmp_path))
    assert str(error.value) == (
        f"`{TALKS}` is on the Hub and needs Hugging Face `datasets`, which is not installed\n\n"
        "hint: pip install 'mbtools[datasets]', or save the data as .parquet"
    )
    assert not list(tmp_path.iterdir())
