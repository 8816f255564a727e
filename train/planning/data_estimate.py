"""Estimates of how often a run reads its corpora, and of the step in which `data.epochs` end it."""

from dataclasses import dataclass

from data.errors import InputError
from data.mixture import Mixture, corpus_field
from data.provenance import summarize
from data.tokenizer.tokenizer import Tokenizer
from model.parameters import parameter_table
from train.config.config import ResolvedConfig
from train.config.optimizer_config import OptimizerConfig
from train.config.parameter_groups import parameter_settings
from train.step.schedule import read_stages

# UTF-8 bytes of each corpus that are read for an estimate at the start of a run.
SAMPLE_BYTES = 2**22
# Text that is read more often than this adds next to nothing (Muennighoff et al. 2023, arXiv:2305.16264, figure 5).
MANY_EPOCHS = 16
# Share of train.num_steps below which a run ends too early for its schedule.
WHOLE_RUN = 0.95


@dataclass(frozen=True)
class DataEstimate:
    """Estimates from a sample of each corpus: (tokens, epochs in the run) by corpus, and the run's last step."""

    by_corpus: dict[str, tuple[int, float]]
    last_step: int

    def text(self, name: str) -> str:
        """Returns the estimate of a corpus as a clause, or an empty text where there is none."""
        if name not in self.by_corpus:
            return ""
        tokens, epochs = self.by_corpus[name]
        return f"; about {tokens:,} tokens, {epochs:.2f} epochs in the run"

    def warnings(self, config: ResolvedConfig) -> list[str]:
        """Returns a line for each corpus that is read too often, and one for a schedule that cannot end."""
        lines = [
            f"warning: {corpus_field(name)} is read about {epochs:,.0f} times in the run, and more than {MANY_EPOCHS} "
            "times add next to nothing; give more text, or lower train.num_steps"
            for name, (_, epochs) in self.by_corpus.items()
            if epochs > MANY_EPOCHS
        ]
        num_steps = config.train.num_steps
        if self.last_step < WHOLE_RUN * num_steps and has_end(config):
            what = "learning rate has fallen" if rate_has_end(config.optimizer) else "schedules have ended"
            lines.append(
                f"warning: data.epochs end the run near step {self.last_step:,} of {num_steps:,}, before its {what}; "
                f"give --config.train.num_steps={self.last_step}, or more epochs"
            )
        return lines


def has_end(config: ResolvedConfig) -> bool:
    """True if the learning rate or the weight decay of any parameter falls to a final value in the run's last step."""
    settings = parameter_settings(config)
    # What has the role "balance" has neither rate nor decay.
    trained = [(p, settings[name]) for name, p in parameter_table(config.model).items() if p.role != "balance"]
    return any(rate_has_end(s) or (p.decay and decay_has_end(s)) for p, s in trained)


def rate_has_end(c: OptimizerConfig) -> bool:
    """True if the learning rate falls to a final value in the run's last step."""
    return c.schedule != "inverse_sqrt" and c.final_fraction < 1 and c.learning_rate > 0


def decay_has_end(c: OptimizerConfig) -> bool:
    """True if weight decay falls to 0 in the run's last step, whatever the learning rate does."""
    return c.weight_decay_schedule in ("linear", "cosine") and c.weight_decay > 0 and c.learning_rate > 0


def estimate_data(config: ResolvedConfig, mixture: Mixture, tokenizer: Tokenizer, begin: int) -> DataEstimate:
    """Estimates from about 4 MiB of each corpus; an unreadable document in it leaves no estimate.

    The data begins in the step numbered `begin`, from 0.
    """
    num_steps = config.train.num_steps
    stages = read_stages(config, begin, num_steps)
    try:
        summaries = summarize(mixture, tokenizer, config.train.seed, stages, SAMPLE_BYTES)
    except InputError:
        return DataEstimate({}, num_steps)
    names = [source.name for source in mixture.sources]
    by_corpus = {name: (s["tokens"], s["epochs"]) for name, s in zip(names, summaries, strict=True)}
    # With several corpora, the first to end ends the run, and none is read after it.
    last_step = min([num_steps, *(s["last_step"] for s in summaries if s["last_step"])])
    by_corpus = {name: (tokens, epochs * last_step / num_steps) for name, (tokens, epochs) in by_corpus.items()}
    return DataEstimate(by_corpus, last_step)
