"""What turns a gradient into an update of the weights."""

import optax

from model.parameters import nested, parameter_table
from train.config import Config
from train.schedule import learning_rate


def make_optimizer(config: Config) -> optax.GradientTransformation:
    """AdamW after clipping by the global norm; decay by the parameter table (matrices, not norms).

    Its state is a dictionary by these names, so that a checkpoint does not depend on the order of the chain.
    """
    c = config.optimizer
    decays = nested({name: p.decay for name, p in parameter_table(config.model).items()})
    return optax.named_chain(
        ("clip", optax.clip_by_global_norm(c.clip_norm) if c.clip_norm else optax.identity()),
        ("adam", optax.scale_by_adam(c.beta1, c.beta2, c.epsilon)),
        ("decay", optax.add_decayed_weights(c.weight_decay, mask=decays)),
        ("schedule", optax.scale_by_learning_rate(learning_rate(config))),
    )
