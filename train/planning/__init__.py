"""Plans: the memory, speed and cost of a run on any devices, read from its compiled training step.

May import `model`, `data`, and from `train` the rooms config, devices and step.

- topology: the devices of a slice or cluster that need not be attached, as in `v5e:16x16`.
- candidate: one legal mesh, number of accumulation parts and remat policy of a search.
- payload: the bytes of a collective's arrays; a ring sends some multiple of them.
- exposed, hidden: time that a step waits for, or that passes behind other work.
"""
