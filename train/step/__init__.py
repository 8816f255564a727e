"""One optimizer update: loss and gradients, optimizers and schedules, and the figures of a step."""
