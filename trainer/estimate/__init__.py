"""Estimate parameters, memory and operations of a model."""
