"""Settings of what is kept of a run, and where. Each field's metadata is as in train/config/config.py."""

import dataclasses
import os
from dataclasses import dataclass, field

from data.files.remote import protocol


@dataclass(frozen=True)
class CheckpointConfig:
    """What is kept of the run."""

    every_steps: int = field(default=500, metadata={"help": "steps between checkpoints", "resume": "free"})
    keep: int = field(default=2, metadata={"help": "the newest checkpoints that stay", "resume": "free"})
    keep_every_steps: int | None = field(
        default=None,
        metadata={"help": "checkpoints whose step is a multiple of this stay, too; none: no others", "resume": "free"},
    )
    dir: str | None = field(
        default=None,
        # The newest checkpoint must be there: see `check_folder`.
        metadata={
            "help": "folder or gs://bucket/path of the checkpoints of this run alone; none: run_dir/checkpoints",
            "resume": "free",
        },
    )
    export: bool = field(
        default=True,
        metadata={"help": "at the end write Hugging Face weights to run_dir/export", "resume": "free"},
    )

    def resolved(self) -> "CheckpointConfig":
        """The same with a path that means the same from everywhere."""
        if self.dir is None or protocol(self.dir):
            return self
        return dataclasses.replace(self, dir=os.path.abspath(os.path.expanduser(self.dir)))

    def problems(self) -> list[str]:
        """Steps and places that fit nothing, one line each."""
        found, every, kept = [], self.every_steps, self.keep_every_steps
        if kept is not None and every > 0 and kept > 0 and kept % every:
            found.append(
                f"checkpoint.keep_every_steps = {kept} is no multiple of checkpoint.every_steps = {every}, so little "
                f"would stay; give {-(-kept // every) * every}"
            )
        place = "folder" if self.dir is None else protocol(self.dir) or "folder"
        if self.dir == "":
            found.append("checkpoint.dir is empty; name a folder, or leave it at none")
        elif place == "s3":
            found.append(
                f"checkpoint.dir = {self.dir}: Orbax cannot write checkpoints to s3:// (the arrays end up elsewhere, "
                "and it says nothing); give a folder, one where the bucket is mounted, or gs://bucket/path"
            )
        elif place not in ("folder", "gs"):
            found.append(f"checkpoint.dir = {self.dir}: checkpoints are written to a folder or to gs://bucket/path")
        return found
