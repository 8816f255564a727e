"""Floor 4: the dense feed-forward, and mixtures of experts."""
