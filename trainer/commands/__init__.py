"""One file per command; this directory is the list of them. Each holds a click command named `command`."""
