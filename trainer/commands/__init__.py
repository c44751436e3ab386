"""One file per command of `mbtrain`, each exporting a click command named `command`."""
