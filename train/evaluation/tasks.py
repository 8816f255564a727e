"""Opens tasks of lm-evaluation-harness, which is imported only when there are any."""

import importlib.util
from typing import TYPE_CHECKING

from data.errors import InputError

if TYPE_CHECKING:
    # The harness is imported where it is used.
    from train.evaluation.harness import Tasks


def open_tasks(
    names: str, folder: str | None, limit: int | None, num_fewshot: int | None = None, asked: str = "evaluation.tasks"
) -> "Tasks":
    """Opens tasks by names such as a,b (see `harness.Tasks`). Raises InputError also without the harness."""
    if importlib.util.find_spec("lm_eval") is None:
        raise InputError(f"{asked} needs the package lm-eval: pip install -e '.[tasks]'")
    given = [name for part in names.split(",") if (name := part.strip())]
    if not given:
        raise InputError(f"{asked} is empty; name a task, as in {asked}=hellaswag")
    from train.evaluation.harness import Tasks

    return Tasks(given, folder, limit, num_fewshot, asked)
