"""Settings of the objective: what training minimizes."""

import re
from dataclasses import dataclass

from settings import problems_of, setting, unused_problems

DEFAULT_BETA = {"dpo": 0.1, "simpo": 2.0}
COMPARING = ("dpo", "simpo", "reward")
# A function as a reward; any other name is that of a model.
REWARD = re.compile(r"(?P<file>.+\.py):(?P<function>[A-Za-z_]\w*)")
OF_GRPO = ("reward", "reward_seconds", "group_size", "max_new_tokens", "updates", "clip", "kl_weight")


@dataclass(frozen=True)
class ObjectiveConfig:
    """The loss of a batch: of its next tokens, of the pairs of answers in it, or of the model's own answers."""

    name: str = setting(
        "next_token",
        "what is minimized: the cross-entropy of the next token, a loss of pairs of answers (data.rejected_field), or "
        "that of sampled answers by their rewards (grpo)",
        choices=("next_token", *COMPARING, "grpo"),
    )
    beta: float | None = setting(
        None, "factor of the log-probabilities in a reward", unset="0.1 with dpo, 2 with simpo", above=0
    )
    label_smoothing: float = setting(
        0.0, "assumed share of pairs whose preference is wrong, with losses of pairs", at_least=0, below=0.5
    )
    length_normalized: bool = setting(
        False,
        "divide the rewards of dpo by the trained tokens of each answer, as simpo always does; with grpo each answer "
        "counts alike, and not each token",
    )
    gamma: float = setting(1.0, "margin by which simpo wants the chosen answer's reward to be higher", at_least=0)
    reward: str | None = setting(
        None,
        "what grpo gives an answer its reward by: FILE.py:FUNCTION, (prompt, answer, reference) -> reward, three texts "
        "and a number, where the reference is the answer in the corpus; or a reward model, RUN, RUN@STEP or WEIGHTS",
        unset="none, which grpo does not take",
        resume="warn",
    )
    reward_seconds: float = setting(60.0, "seconds that a call of the reward may take", resume="free", above=0)
    group_size: int = setting(8, "answers that grpo samples to a prompt", at_least=2, at_most=2**16)
    max_new_tokens: int = setting(64, "tokens of a sampled answer at most", at_least=1, at_most=2**24)
    updates: int = setting(1, "optimizer updates that grpo makes with a step's answers", at_least=1, at_most=64)
    clip: float = setting(
        0.2, "change of a token's probability, as a share, from which on grpo has no gradient", above=0
    )
    kl_weight: float = setting(0.04, "weight of the KL divergence to the reference in the loss of grpo", at_least=0)

    @property
    def compares(self) -> bool:
        """True if it is a loss of pairs of answers."""
        return self.name in COMPARING

    @property
    def samples(self) -> bool:
        """True if it is a loss of answers that the model samples itself."""
        return self.name == "grpo"

    @property
    def names_function(self) -> bool:
        """True if the reward is a function in a file, and not a model."""
        return self.samples and REWARD.fullmatch(self.reward or "") is not None

    @property
    def rows_of_prompt(self) -> int:
        """The rows of a batch that are made of one row of the data."""
        return self.group_size if self.samples else 1

    @property
    def uses_reference(self) -> bool:
        """True if the state keeps a frozen copy of the weights that the run begins with."""
        return self.name == "dpo" or (self.samples and self.kl_weight > 0)

    @property
    def reward_factor(self) -> float:
        """The value of `beta`, or its default."""
        return DEFAULT_BETA[self.name] if self.beta is None else self.beta

    @property
    def per_token(self) -> bool:
        """True if the rewards are divided by the tokens of each answer."""
        return self.name == "simpo" or self.length_normalized

    def problems(self) -> list[str]:
        """Returns one line for everything that is wrong with these values, naming the field."""
        without = {
            "next_token": ("beta", "label_smoothing", "length_normalized", "gamma", *OF_GRPO),
            "dpo": ("gamma", *OF_GRPO),
            "simpo": ("length_normalized", *OF_GRPO),
            "reward": ("beta", "length_normalized", "gamma", *OF_GRPO),
            "grpo": ("beta", "label_smoothing", "gamma"),
        }
        unused = dict.fromkeys(without.get(self.name, ()), f"objective.name = {self.name}")
        return problems_of("objective", self) + unused_problems("objective", self, unused)
