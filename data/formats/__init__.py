"""Formats of corpora: how documents are read from a byte range of a file."""
