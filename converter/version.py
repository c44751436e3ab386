"""The version of this package. `pyproject.toml` takes the installed package's version from here."""

VERSION = "0.1.0"
