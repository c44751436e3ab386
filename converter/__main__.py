"""`python -m converter` is `mbconvert`."""

from converter.cli import main

main()
