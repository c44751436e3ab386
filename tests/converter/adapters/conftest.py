"""Adapters that PEFT itself makes and saves beside a tiny model."""

from __future__ import annotations

import pytest

from tests.converter.adapters.made import save_adapter


@pytest.fixture(scope="session")
def base(model_folder):
    return model_folder("gqa")


@pytest.fixture(scope="session")
def peft_folder(tmp_path_factory, base):
    """A saved adapter by its options, made once a session. Not to be written into."""
    made = {}

    def make(**options):
        key = repr(sorted(options.items()))
        if key not in made:
            made[key] = save_adapter(base, tmp_path_factory.mktemp("peft") / "adapter", **options)
        return made[key]

    return make
