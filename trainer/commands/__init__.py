"""One command of `mbtrain` per file; this directory is the list of them."""
