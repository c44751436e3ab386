"""Tests of `trainer`, named as its files."""
