"""Shared fixtures: megatron-core on a few processes, tiny models made once."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import hypothesis
import pytest

from tests import megatron_cpu, models, quick_cases
from tests.ranks import Ranks
from tests.servers import HOST

hypothesis.settings.register_profile("no deadline", deadline=None)  # a test asserts no time
hypothesis.settings.load_profile("no deadline")

SECRET = "s3cr3t-t0ken"
GOLDEN = Path(__file__).parent / "golden"


def pytest_configure(config: pytest.Config) -> None:
    """Give each process of `pytest -n` a session of its own: Linux divides a busy machine among sessions first."""
    if hasattr(config, "workerinput"):
        os.setsid()


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave most cases of tests that take long to `make test-slow`, before `-m` chooses among them."""
    quick_cases.mark_others_slow(config, items)


@pytest.fixture(scope="session")
def processes() -> Iterator[Ranks]:
    """Processes that stand for GPUs."""
    ranks = Ranks()
    yield ranks
    ranks.write_results.close()


@pytest.fixture(scope="session")
def ranks(processes: Ranks) -> megatron_cpu.Ranks:
    """Processes that run megatron-core."""
    return megatron_cpu.Ranks(processes)


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """A saved model by its variant and options, made once a session. Not to be written into."""
    made: dict[str, Path] = {}

    def make(variant: str = "gqa", *, max_shard_size: str = "5GB", **options) -> Path:
        key = repr((variant, max_shard_size, sorted(options.items())))
        if key not in made:
            folder = tmp_path_factory.mktemp(variant) / "model"
            made[key] = models.save(models.build(variant, **options), folder, max_shard_size=max_shard_size)
        return made[key]

    return make


@pytest.fixture
def golden() -> Path:
    """Files made by megatron-core with Transformer Engine, and by Megatron-Bridge."""
    return GOLDEN


@pytest.fixture
def at_home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No credentials of whoever runs the tests, no service that gives some, and no proxy."""
    for name in [name for name in os.environ if name.startswith(("AWS_", "HF_", "GOOGLE_")) or "proxy" in name.lower()]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "AKIDEXAMPLE")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    monkeypatch.setenv("HF_TOKEN", SECRET)
    monkeypatch.setenv("NO_GCE_CHECK", "true")


@pytest.fixture(scope="session")
def moto() -> Iterator[int]:
    """A server that speaks S3; its port."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(HOST, 0, verbose=False)
    server.start()
    yield server.get_host_and_port()[1]
    server.stop()
