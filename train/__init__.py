"""Training: everything that changes weights, and everything that a run keeps.

The modules here tell the story of a run, from `loop.pretrain` down. The rooms below import one way, in this order:
config, devices, step, run, checkpoint, weights, evaluation, planning. May import `settings`, `model` and `data`.

- start: one process lifetime of a run; a run has as many starts as it was launched.
- starting point: the state and place in the data from which a start trains (`starting_point`).
- in flight: dispatched to the devices and not logged yet (`in_flight`).
- identity: the settings and fingerprints that the order of the data follows from (`data_identity`).
- rollback: a return to the last save after a spike, to try its rows again or to skip them.
- fork: a new run that starts from a checkpoint of another.
"""
