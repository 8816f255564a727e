"""Settings of the objective: what training minimizes."""

from dataclasses import dataclass

from settings import problems_of, setting, unused_problems

DEFAULT_BETA = {"dpo": 0.1, "simpo": 2.0}


@dataclass(frozen=True)
class ObjectiveConfig:
    """The loss of a batch: of its next tokens, or of the pairs of answers in it."""

    name: str = setting(
        "next_token",
        "what is minimized: the cross-entropy of the next token, or a loss of pairs of answers (data.rejected_field)",
        choices=("next_token", "dpo", "simpo", "reward"),
    )
    beta: float | None = setting(
        None, "factor of the log-probabilities in a reward", unset="0.1 with dpo, 2 with simpo", above=0
    )
    label_smoothing: float = setting(
        0.0, "assumed share of pairs whose preference is wrong, with losses of pairs", at_least=0, below=0.5
    )
    length_normalized: bool = setting(
        False, "divide the rewards of dpo by the trained tokens of each answer, as simpo always does"
    )
    gamma: float = setting(1.0, "margin by which simpo wants the chosen answer's reward to be higher", at_least=0)

    @property
    def compares(self) -> bool:
        """True if it is a loss of pairs of answers."""
        return self.name != "next_token"

    @property
    def uses_reference(self) -> bool:
        """True if the state keeps a frozen copy of the weights that the run begins with."""
        return self.name == "dpo"

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
            "next_token": ("beta", "label_smoothing", "length_normalized", "gamma"),
            "dpo": ("gamma",),
            "simpo": ("length_normalized",),
            "reward": ("beta", "length_normalized", "gamma"),
        }
        unused = dict.fromkeys(without.get(self.name, ()), f"objective.name = {self.name}")
        return problems_of("objective", self) + unused_problems("objective", self, unused)
