"""Finds everything that is wrong with a config: the problems of each group, and of groups together."""

import json

from train.config.config import Config


def config_problems(config: Config) -> list[str]:
    """Returns one line for every value that is impossible alone or with others, naming fields and a remedy."""
    c = config
    groups = (c.model, c.data, c.tokenizer, c.mesh, c.train, c.checkpoint, c.recovery, c.evaluation)
    problems = [problem for group in groups for problem in group.problems()]
    problems += c.optimizer.problems(c.train.num_steps)
    texts = {"train.run_dir": c.train.run_dir, "data.corpus": c.data.corpus, "evaluation.prompt": c.evaluation.prompt}
    for name, value in texts.items():
        try:
            (value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)).encode()
        except UnicodeEncodeError:
            problems.append(f"{name} is not valid UTF-8")
    if c.model.max_positions and c.model.max_positions < c.data.segment_length:
        problems.append(
            f"model.max_positions = {c.model.max_positions} is less than data.segment_length = "
            f"{c.data.segment_length}; raise it, or leave it at none"
        )
    first = "batch_size" if c.train.batch_ramp_start is None else "batch_ramp_start"
    rows = getattr(c.train, first)
    if c.num_streams >= 1 and rows % c.num_streams:
        divisors = [d for d in range(1, max(rows, 1) + 1) if rows % d == 0]
        nearest = min(divisors, key=lambda d: abs(d - c.num_streams))
        problems.append(
            f"data.num_streams = {c.num_streams} does not divide train.{first} = {rows}; nearest that does: {nearest}"
        )
    return problems
