"""Run `mbconvert` as `python -m converter`."""

from mbtools import mbconvert

mbconvert()
