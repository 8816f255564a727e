"""One optimizer update: loss and gradients, optimizers and schedules, and the figures of a step.

May import `model`, `data.errors`, `train.config` and `train.devices`.

- part: one of the A equal shares of a batch that gradient accumulation runs in sequence.
- watching step: a step that also measures every layer (`train.watch_every_steps`).
- spike: a loss that is an outlier among the last ones, or a figure that is not finite.
"""
