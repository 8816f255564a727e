"""Write constraints.txt: `make lock`, or `python .ci/lock.py PYTHON...` with one interpreter for each version.

Each interpreter resolves the project afresh with pip and installs nothing. Where they agree a pin stands for all;
where they differ each pin has its Python's marker. The CUDA libraries are left to what jax and torch pin themselves.
"""

import json
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RESOLVE = ["-m", "pip", "install", "--dry-run", "--ignore-installed", "--quiet", "--report", "-"]
PINNED_ELSEWHERE = re.compile(r"ziggurat|nvidia-.*|cuda-.*|triton")


def resolve(python: str) -> tuple[str, dict[str, str]]:
    """The interpreter's version as `3.11`, and the version of each package that a fresh install would get there."""
    output = subprocess.check_output([python, *RESOLVE, ".[test,peers]"], cwd=ROOT)
    report = json.loads(output)
    packages = (item["metadata"] for item in report["install"])
    pins = {re.sub(r"[-_.]+", "-", p["name"]).lower(): p["version"].partition("+")[0] for p in packages}
    return report["environment"]["python_version"], {
        name: version for name, version in pins.items() if not PINNED_ELSEWHERE.fullmatch(name)
    }


def main(pythons: list[str]) -> None:
    resolved = dict(resolve(python) for python in pythons)
    lines = [f"# Written by `make lock`, for Python {' and '.join(resolved)}."]
    for name in sorted(set().union(*resolved.values())):
        versions = {pins[name] for pins in resolved.values() if name in pins}
        if len(versions) == 1:
            lines.append(f"{name}=={versions.pop()}")
        else:
            lines += [f'{name}=={pins[name]} ; python_version == "{python}"' for python, pins in resolved.items()]
    (ROOT / "constraints.txt").write_text("\n".join(lines) + "\n")


main(sys.argv[1:])
