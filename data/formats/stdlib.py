"""The default corpus: the running Python's standard library, as .jsonl."""

import json
import sysconfig
from pathlib import Path

from data.files.atomic import atomic_file

LEFT_OUT = {"test", "tests", "idle_test", "encodings", "site-packages", "dist-packages", "__pycache__"}


def snapshot_stdlib(path: Path) -> None:
    """Writes the library's source files without tests and `encodings`, one on each line with its name, atomically."""
    root = Path(sysconfig.get_path("stdlib"))
    with atomic_file(path) as partial, partial.open("w", encoding="utf-8") as out:
        for file in sorted(root.rglob("*.py")):
            name = file.relative_to(root)
            if LEFT_OUT.isdisjoint(name.parts):
                text = file.read_bytes().decode(errors="ignore")
                out.write(json.dumps({"path": name.as_posix(), "text": text}, ensure_ascii=False) + "\n")
