"""The reward of the assistant, which `objective.reward` names."""

import json


def right_sum(prompt: str, answer: str, reference: str) -> float:
    """Returns 1 for an answer that is JSON with the number of the reference, and 0 for any other."""
    try:
        return float(json.loads(answer) == json.loads(reference))
    except ValueError:
        return 0.0
