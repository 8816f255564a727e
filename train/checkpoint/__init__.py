"""Checkpoints: saving, restoring, and reading one layer at a time. May import config, devices, step and run.

Words of this room:
- item: a part of a checkpoint that is stored and restored alone: weights, optimizer, average, reference or progress.
- progress: everything that is not an array: the positions in the data, fingerprints and checksums, as JSON.
- checksum, digest: a number for each array that no mesh changes; a hash of the progress.
- plain tree: the state as nested dictionaries, which Orbax stores.
- replica: the copy of an array, or of its shard, that each of several devices has.
"""
