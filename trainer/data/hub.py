"""Download datasets from the Hugging Face Hub with `datasets` into a local folder, which is then read like any other.

Datasets are not streamed: a sample number means the same sample only if all examples are present. No code of a dataset runs;
`datasets` 4 has no dataset scripts.
"""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

from formats.errors import UserError
from formats.faults import fault
from trainer.data import cache, records
from trainer.data.records import list_some

PREFIX = "hf://"
_URL = re.compile(
    r"hf://datasets/(?P<id>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)"
    r"(@(?P<revision>refs/[\w.-]+/[\w.-]+|[\w.-]+))?(/(?P<config>[\w.-]+))?/?"
)
METADATA_FILE = "hub.json"
"""In the local folder: the dataset's id, the downloaded commit, and the configuration."""


def is_url(source: str) -> bool:
    """Return whether a source is on the Hub: an `hf://` URL, not a path."""
    return source.startswith(PREFIX)


def local_path(source: str, folder: str | None) -> Path:
    """Return the local path of a source. A path is returned unchanged; a Hub dataset is downloaded into `folder` if it is
    missing.

    A download is never updated, so that a resumed run reads the same data. If `folder` is None, `mbtrain` in `HF_HOME` is used.
    Ranks call this in turn (`cache.first_rank_first`). Raises UserError if the URL is malformed or the download fails.
    """
    if not is_url(source):
        return Path(source)
    url = _URL.fullmatch(source)
    if not url:
        raise UserError(
            f"`{source}` is not a dataset URL of the Hub",
            hint="it should look like `hf://datasets/org/name`, `hf://datasets/org/name@revision` or "
            "`hf://datasets/org/name/configuration`",
        )
    root = Path(folder) if folder else _home()
    target = root / re.sub(r"[^\w.@-]+", "--", source.removeprefix("hf://datasets/").rstrip("/"))
    if not target.is_dir():
        try:
            cache.write_folder(target, lambda partial: _download(source, url, partial))
        except OSError as error:
            raise cache.cannot_write(root, "a dataset", error) from error
    return target


def _home() -> Path:
    from huggingface_hub import constants  # noqa: PLC0415 - slow to import

    return Path(constants.HF_HOME) / "mbtrain"


def _download(source: str, url: re.Match[str], folder: Path) -> None:
    datasets = records.import_datasets(f"`{source}` is on the Hub and needs Hugging Face `datasets`")
    from huggingface_hub import HfApi  # noqa: PLC0415

    try:
        commit = HfApi().dataset_info(url["id"], revision=url["revision"]).sha
        configs = datasets.get_dataset_config_names(url["id"], revision=commit)
        config = _choose_config(source, url["config"], configs)
        dataset = datasets.load_dataset(url["id"], config, revision=commit, cache_dir=str(folder / "fetched"))
        dataset.save_to_disk(str(folder))
    except UserError:
        raise
    except Exception as error:  # any of many kinds, from several libraries
        raise UserError(
            f"cannot download `{source}`: {fault(error)}",
            hint="check the name, the network and HF_HUB_OFFLINE; for gated and private datasets, `hf auth login` or HF_TOKEN",
        ) from error
    shutil.rmtree(folder / "fetched", ignore_errors=True)
    (folder / METADATA_FILE).write_text(json.dumps({"id": url["id"], "revision": commit, "configuration": config}, indent=2))


def _choose_config(source: str, name: str | None, available: list[str]) -> str:
    if name is None and len(available) > 1 and "default" not in available:
        raise UserError(
            f"`{source}` has several configurations: {list_some(available)}",
            hint=f"name one: `{source.rstrip('/')}/{available[0]}`",
        )
    if name is not None and name not in available:
        raise UserError(f"`{source}` has no configuration `{name}`: it has {list_some(available)}", hint="name one of those")
    return name or ("default" if "default" in available else available[0])
