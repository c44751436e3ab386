"""The families: a template, and what is expected of it."""
