"""Weights that are stored as short codes with scales, read as the plain numbers that they mean.

Each scheme of storing them is one file with both directions; which one a model uses is left to the converter.
"""
