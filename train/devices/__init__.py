"""Devices and processes: everything that depends on how many there are. May import config.

Words of this room:
- mesh: the devices of all processes on named axes (`AXES`).
- slice: TPUs with fast links to each other; the mesh axis `slice` spans several of them.
- rules: the table of logical axis → mesh axes.
- process: one Python process of a run; process 0 writes all files but its own shards of checkpoints.
- agreement: scalars that all processes exchange at every step to take the same decisions.
- chip: the figures of an accelerator.
"""
