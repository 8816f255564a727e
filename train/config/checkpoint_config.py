"""Settings of checkpoints and exports: how often, where, and how many are kept."""

import dataclasses
import os
from dataclasses import dataclass

from data.files.remote import protocol
from settings import problems_of, setting


@dataclass(frozen=True)
class CheckpointConfig:
    """Checkpoints and exports of a run."""

    every_steps: int = setting(500, "steps between checkpoints", resume="free", at_least=1)
    keep: int = setting(2, "number of newest checkpoints to keep", resume="free", at_least=1)
    keep_every_steps: int | None = setting(
        None, "also keep checkpoints whose step is a multiple of this", unset="no others", resume="free", at_least=1
    )
    # `check_folder` makes sure on resume that the newest checkpoint is in this folder.
    dir: str | None = setting(
        None,
        "folder or gs://bucket/path for the checkpoints of this run alone",
        unset="run_dir/checkpoints",
        resume="free",
    )
    export: bool = setting(True, "write Hugging Face weights to run_dir/export at the end", resume="free")

    def resolved(self) -> "CheckpointConfig":
        """Returns the same settings with an absolute path."""
        if self.dir is None or protocol(self.dir):
            return self
        return dataclasses.replace(self, dir=os.path.abspath(os.path.expanduser(self.dir)))

    def problems(self) -> list[str]:
        """Returns one line for everything that is wrong with these values, naming the field."""
        problems = problems_of("checkpoint", self)
        every = self.every_steps
        if (kept := self.keep_every_steps) and min(every, kept) > 0 and kept % every:
            problems.append(
                f"checkpoint.keep_every_steps = {kept} is not a multiple of checkpoint.every_steps = {every}, so "
                f"little would stay; give {-(-kept // every) * every}"
            )
        kind = protocol(self.dir or "")
        if self.dir == "":
            problems.append("checkpoint.dir is empty; name a folder, or leave it at none")
        elif kind == "s3":
            problems.append(
                f"checkpoint.dir = {self.dir}: Orbax cannot write checkpoints to s3:// (it puts the arrays elsewhere, "
                "without an error); give a folder, one where the bucket is mounted, or gs://bucket/path"
            )
        elif kind not in ("", "gs"):
            problems.append(f"checkpoint.dir = {self.dir}: checkpoints are written to a folder or to gs://bucket/path")
        return problems
