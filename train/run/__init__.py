"""A run's folder and everything that is written to it apart from checkpoints. May import config, devices and step.

Words of this room:
- lease: the right of one start to write to the folder, with a heartbeat that shows that it is alive.
- ledger: the batches that the run has retried and skipped, in recovery.jsonl.
- events: the audit log, which records starts, saves, faults and everything else apart from steps.
- step log: a file with one line a step, as metrics.jsonl and positions.jsonl are.
- time account, goodput: the seconds of a start by activity; the share of a run's time in steps that count.
- curve: the losses of a run over all its steps, drawn for a terminal.
- tracker: a service or program that shows the numbers of steps, as TensorBoard does.
"""
