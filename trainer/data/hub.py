"""Data sets on the Hugging Face Hub: fetched once by `datasets` into a local folder, which is then read like any other.

Nothing is streamed: a sample number is a position only where all examples are there. No code of a data set is run; `datasets`
has no means to.
"""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

from formats.errors import UserError
from formats.faults import fault
from trainer.data import cache, records
from trainer.data.records import names

PREFIX = "hf://"
_URL = re.compile(
    r"hf://datasets/(?P<id>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)"
    r"(@(?P<revision>refs/[\w.-]+/[\w.-]+|[\w.-]+))?(/(?P<config>[\w.-]+))?/?"
)
ABOUT = "hub.json"
"""In the local folder: the id, the commit that was fetched, and the configuration."""


def is_url(source: str) -> bool:
    """Is that on the Hub rather than a path?"""
    return source.startswith(PREFIX)


def local(source: str, folder: str | None) -> Path:
    """Where a source is on this machine: a path as it is; of the Hub the copy in `folder`, fetched if it is not there.

    A copy stays as it is, whatever the Hub has later: a run that resumes reads what it has read. `folder` is None for
    `mbtrain` in Hugging Face's own (`HF_HOME`). To be called by one rank after another (`cache.in_turn`).
    """
    if not is_url(source):
        return Path(source)
    found = _URL.fullmatch(source)
    if not found:
        raise UserError(
            f"`{source}` is not a data set on the Hub",
            hint="it should look like `hf://datasets/org/name`, `hf://datasets/org/name@revision` or "
            "`hf://datasets/org/name/configuration`",
        )
    root = Path(folder) if folder else _home()
    whole = root / re.sub(r"[^\w.@-]+", "--", source.removeprefix("hf://datasets/").rstrip("/"))
    if not whole.is_dir():
        try:
            cache.put(whole, lambda partial: _fetch(source, found, partial))
        except OSError as error:
            raise cache.cannot_write(root, "a data set", error) from error
    return whole


def _home() -> Path:
    from huggingface_hub import constants  # noqa: PLC0415 - slow to import

    return Path(constants.HF_HOME) / "mbtrain"


def _fetch(source: str, url: re.Match[str], folder: Path) -> None:
    datasets = records.needed(f"`{source}` is on the Hub, and is fetched by Hugging Face `datasets`")
    from huggingface_hub import HfApi  # noqa: PLC0415

    try:
        commit = HfApi().dataset_info(url["id"], revision=url["revision"]).sha
        configs = datasets.get_dataset_config_names(url["id"], revision=commit)
        config = _config(source, url["config"], configs)
        found = datasets.load_dataset(url["id"], config, revision=commit, cache_dir=str(folder / "fetched"))
        found.save_to_disk(str(folder))
    except UserError:
        raise
    except Exception as error:  # any of many kinds, from several libraries
        raise UserError(
            f"cannot fetch `{source}`: {fault(error)}",
            hint="check the name, the network and HF_HUB_OFFLINE; for gated and private data sets, `hf auth login` or HF_TOKEN",
        ) from error
    shutil.rmtree(folder / "fetched", ignore_errors=True)
    (folder / ABOUT).write_text(json.dumps({"id": url["id"], "revision": commit, "configuration": config}, indent=2))


def _config(source: str, wanted: str | None, there: list[str]) -> str:
    if wanted is None and len(there) > 1 and "default" not in there:
        raise UserError(
            f"`{source}` has several configurations: {names(there)}", hint=f"name one: `{source.rstrip('/')}/{there[0]}`"
        )
    if wanted is not None and wanted not in there:
        raise UserError(f"`{source}` has no configuration `{wanted}`: it has {names(there)}", hint="name one of those")
    return wanted or ("default" if "default" in there else there[0])
