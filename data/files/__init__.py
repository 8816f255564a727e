"""Files and places: listings of local and remote files, byte ranges, retries, and atomic writes.

May import `data.errors` and `data.config`.

- listing: the files that `data.corpus` names, with their sizes and versions, known before any content is read.
- local, remote: on this machine's file system, or behind a URL that fsspec reads.
- version: what identifies the content of a file without reading it: an ETag, or a time of modification.
- name, path: relative to what the files of a listing have in common; where the file is.
"""
