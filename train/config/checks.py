"""Finds everything that is wrong with a config: the problems of each group, and of groups together."""

import json

from train.config.config import Config


def config_problems(config: Config) -> list[str]:
    """Returns one line for every value that is impossible alone or with others, naming fields and a remedy."""
    c = config
    groups = (c.model, c.data, c.tokenizer, c.mesh, c.train, c.checkpoint, c.recovery, c.evaluation)
    problems = [problem for group in groups for problem in group.problems()]
    problems += c.optimizer.problems(c.train.num_steps)
    return problems + _encoding_problems(c) + _position_problems(c) + _stream_problems(c)


def _encoding_problems(c: Config) -> list[str]:
    values = {"train.run_dir": c.train.run_dir, "data.corpus": c.data.corpus, "evaluation.prompt": c.evaluation.prompt}
    problems = []
    for name, value in values.items():
        try:
            (value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)).encode()
        except UnicodeEncodeError:
            problems.append(f"{name} is not valid UTF-8")
    return problems


def _position_problems(c: Config) -> list[str]:
    if not c.model.max_positions or c.model.max_positions >= c.data.segment_length:
        return []
    return [
        f"model.max_positions = {c.model.max_positions} is less than data.segment_length = "
        f"{c.data.segment_length}; raise it, or leave it at none"
    ]


def _stream_problems(c: Config) -> list[str]:
    first = "batch_size" if c.train.batch_ramp_start is None else "batch_ramp_start"
    rows = getattr(c.train, first)
    if c.num_streams < 1 or rows % c.num_streams == 0:
        return []
    divisors = [d for d in range(1, max(rows, 1) + 1) if rows % d == 0]
    nearest = min(divisors, key=lambda d: abs(d - c.num_streams))
    return [f"data.num_streams = {c.num_streams} does not divide train.{first} = {rows}; nearest that does: {nearest}"]
