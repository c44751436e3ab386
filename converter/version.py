"""The version of this package. The installed package's metadata is made from it, as `pyproject.toml` says."""

VERSION = "0.1.0"
