"""Answers that the model samples itself, and the rewards that they get (`objective.name=grpo`).

1. `prompt.py`: a row of the data as a prompt and the answer that the corpus has.
2. `reward.py`, `reward_model.py`: the user's function, or a reward model, which gives an answer its reward.
3. `rollouts.py`: prompts of a step → groups of sampled answers → rewards → the batch that the step trains on.
"""
