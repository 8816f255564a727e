"""Files and places: listings of local and remote files, byte ranges, retries, and atomic writes.

May import `data.errors` and `data.config`.

- listing: the files that `data.corpus` names, with their sizes and versions, known before any content is read.
- local, remote: on this machine's file system, or behind a URL that fsspec reads.
"""
