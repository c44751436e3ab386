"""Directories that are not on a disk, by URL: read by byte range, written in parts."""
