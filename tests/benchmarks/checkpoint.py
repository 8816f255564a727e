"""What checkpoints cost: python -m tests.benchmarks.checkpoint [--layers=N] [--to=FOLDER]

A run of a mid-size model saves twice behind its steps, then is started again. Beside it, the same bytes are written
and read as one plain file in the same folder, before and after. Reported are the stall of the loop per save (what the
`save` events say, and what the step around it took beyond the others), how fast a checkpoint is written and restored,
and the seconds from the command to its first step, new and on resume. The last line is one JSON object.
"""

import argparse
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from ml_collections import ConfigDict

from launch.cli import prepare_process

ROOT = Path(__file__).resolve().parent.parent.parent
STEPS, EVERY = 16, 8
PIECE = 2**24


def write_config(folder: Path, layers: int) -> Path:
    """A model of about 4 + 3.2 × layers million parameters, with AdamW's two moments."""
    config = ConfigDict()
    config.model = {"num_layers": layers, "model_dim": 512, "num_heads": 8, "feedforward_dim": 1408}
    config.data = {"segment_length": 128}
    config.tokenizer = {"sample_bytes": 2**20}
    config.train = {"run_dir": str(folder / "run"), "num_steps": STEPS, "batch_size": 4, "log_every_steps": 1}
    config.checkpoint = {"every_steps": EVERY, "export": False}
    config.evaluation = {"every_steps": 10**6, "max_bytes": 4096, "loop_bytes": 4096, "sample_tokens": 1}
    path = folder / "config.py"
    values = json.dumps(config.to_dict()).replace("true", "True").replace("false", "False")
    path.write_text(f"from ml_collections import ConfigDict\n\n\ndef get_config():\n    return ConfigDict({values})\n")
    return path


def run(config: Path, *flags: str) -> tuple[list[tuple[float, str]], float]:
    """((seconds since the start, line) of each line of the run, seconds in all)."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "launch.cli", "pretrain", f"--config={config}", *flags]
    begun = time.perf_counter()
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    lines = []
    for line in process.stderr:
        lines.append((time.perf_counter() - begun, line.rstrip()))
    if process.wait():
        sys.exit("\n".join(line for _, line in lines))
    return lines, time.perf_counter() - begun


def first_step(lines: list[tuple[float, str]]) -> float:
    """Seconds until the first step was done."""
    return next(seconds for seconds, line in lines if re.match(r"step \d+/", line))


def forget(path: Path) -> None:
    """Let the system's cache drop a file, as far as it does."""
    with path.open("rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def plain(folder: Path, size: int) -> tuple[float, float]:
    """Bytes a second of writing one file of so many bytes, until it is on disk, and of reading it."""
    path, piece = folder / "plain", os.urandom(PIECE)
    begun = time.perf_counter()
    with path.open("wb") as file:
        for _ in range(-(-size // PIECE)):
            file.write(piece)
        file.flush()
        os.fsync(file.fileno())
    written = time.perf_counter() - begun
    forget(path)
    begun = time.perf_counter()
    with path.open("rb") as file:
        while file.read(PIECE):
            pass
    read = time.perf_counter() - begun
    path.unlink()
    return size / written, size / read


def restore_and_save(folder: Path) -> tuple[list[float], float, float]:
    """Seconds of restoring the newest checkpoint, its checksums compared, the first time (their program is compiled)
    and again; of handing it over to be saved; and until it is on disk."""
    import jax

    from train.checkpoint.checkpoint import Checkpoints
    from train.config.checkpoint_config import CheckpointConfig
    from train.devices.mesh import one_device_mesh
    from train.run.folder import Run
    from train.step.optimizer import make_optimizer
    from train.step.state import abstract_state

    config = Run(folder).load_config()
    with jax.set_mesh(one_device_mesh()):
        checkpoints = Checkpoints(folder / "checkpoints")
        restored = []
        for _ in range(2):
            for path in (folder / "checkpoints").rglob("*"):
                if path.is_file():
                    forget(path)
            begun = time.perf_counter()
            found = jax.block_until_ready(checkpoints.restore(abstract_state(config, make_optimizer(config))))
            restored.append(time.perf_counter() - begun)
        assert found
        checkpoints.close()
        checkpoints, place = Checkpoints(folder / "again", CheckpointConfig()), folder / "again"
        seconds = []
        # The first compiles the checksums' program.
        for step in (1, 2):
            state = {**found[0], "step": jax.numpy.int32(step)}
            checkpoints.wait()
            begun = time.perf_counter()
            checkpoints.save(state, {})
            handed = time.perf_counter() - begun
            checkpoints.wait()
            seconds.append((handed, time.perf_counter() - begun))
        checkpoints.close()
    shutil.rmtree(place)
    return restored, *seconds[-1]


def main() -> None:
    """Run it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=16, help="of the model [16: 55 million parameters]")
    parser.add_argument("--to", type=Path, help="the folder whose disk is measured [a temporary one]")
    arguments = parser.parse_args()
    prepare_process([])
    with tempfile.TemporaryDirectory(dir=arguments.to) as name:
        folder = Path(name)
        config = write_config(folder, arguments.layers)
        print(f"training {STEPS} steps, saving every {EVERY}", flush=True)
        new, _ = run(config)
        checkpoint = folder / "run" / "checkpoints" / str(STEPS)
        size = sum(file.stat().st_size for file in checkpoint.rglob("*") if file.is_file())
        before = plain(folder, size)
        print("starting again", flush=True)
        again, _ = run(config, f"--config.train.num_steps={STEPS + 2}")
        print("saving and restoring alone", flush=True)
        shutil.rmtree(folder / "run" / "checkpoints" / str(STEPS + 2))
        (first_restored, restored), handed, saved = restore_and_save(folder / "run")
        after = plain(folder, size)
        events = [json.loads(line) for line in (folder / "run" / "events.jsonl").read_text().splitlines()]
    stalls = [event["stall_seconds"] for event in events if event["event"] == "save"]
    ends = {int(found[1]): at for at, line in new if (found := re.match(r"step (\d+)/", line))}
    took = {step: ends[step] - ends[step - 1] for step in ends if step - 1 in ends}
    # The step after a save has its stall in it; steps 1 and 2 have compilation.
    usual = statistics.median(took[step] for step in took if step > 2 and step % EVERY not in (0, 1))
    write, read = ((one + other) / 2 for one, other in zip(before, after, strict=True))
    figures = {
        "bytes": size,
        "stall_seconds": stalls,
        "stall_by_steps_seconds": round(took[EVERY + 1] - usual, 3),
        "step_seconds": round(usual, 3),
        "steps_while_writing_seconds": [round(took[step], 3) for step in range(EVERY + 2, 2 * EVERY)],
        "save_seconds": round(saved, 3),
        "save_handed_over_seconds": round(handed, 3),
        "save_bytes_per_second": round(size / saved),
        "plain_write_bytes_per_second": [round(before[0]), round(after[0])],
        "save_share_of_plain": round(size / saved / write, 3),
        "restore_with_compilation_seconds": round(first_restored, 3),
        "restore_seconds": round(restored, 3),
        "restore_bytes_per_second": round(size / restored),
        "plain_read_bytes_per_second": [round(before[1]), round(after[1])],
        "restore_share_of_plain": round(size / restored / read, 3),
        "new_to_first_step_seconds": round(first_step(new), 2),
        "resume_to_first_step_seconds": round(first_step(again), 2),
    }
    print(f"checkpoint           {size / 1e6:,.0f} MB")
    print(f"stall per save       {', '.join(f'{stall:.2f}' for stall in stalls)} s")
    print(f"by the steps' times  {figures['stall_by_steps_seconds']:.2f} s (a step takes {usual:.2f} s)")
    for what, seconds, plainly, share in (
        ("save", saved, write, figures["save_share_of_plain"]),
        ("restore", restored, read, figures["restore_share_of_plain"]),
    ):
        rate = size / seconds / 1e6
        print(f"{what:21}{rate:,.0f} MB/s in {seconds:.2f} s; plain {plainly / 1e6:,.0f} MB/s ({share})")
    print(f"start to first step  new {first_step(new):.1f} s, resumed {first_step(again):.1f} s")
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
