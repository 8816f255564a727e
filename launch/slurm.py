"""Run pretraining on a Slurm cluster: ziggurat launch slurm --nodes=2 --gpus-per-node=8 --submit -- pretrain --config=…

Writes a script for sbatch to standard output, or submits it and prints the number of the job. Some minutes before its
time is up, Slurm signals the job, which saves and goes back to the queue. A run that fails is started again, depending
on its exit status.
"""

import argparse
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from data.errors import InputError
from data.files.remote import protocol
from data.printable import name_problem
from launch.arguments import one_line, path, too_small
from launch.submission import check_command, write_submission

# Between Slurm's signal and the end of the job: a step, a save, and Slurm's own delay of up to a minute.
NOTICE_SECONDS = 300
# Once one task has ended, the others have this time to save, or to print their error.
WAIT_SECONDS = 60
# By this line a later command recognizes a script that it may replace.
MADE_BY = "# Made by ziggurat launch slurm."
# srun returns the highest status of all tasks. Each status is mapped so that a more informative one is higher: tasks
# killed because another has failed must not hide why that one failed. The shell ignores signals; its child gets them.
TASK = 'trap : TERM INT; "$@"; case $? in 0) ;; 75) exit 75 ;; 2) exit 200 ;; *) exit 100 ;; esac'
SCRIPT = """\
#!/bin/bash
{made_by}
{lines}

# 0: done. 2: the user's error. 75: stopped, so back to the queue. All else is a fault: the run starts again after a
# pause, until more than three faults in a row have saved nothing new.
run() {{
    {srun} \\
        sh -c {task} sh \\
        {command}
}}
saved() {{ {saved}; }}

in_vain=0
reached=$(saved)
while true; do
    run
    status=$?
    before=$reached
    reached=$(saved)
    case $status in
        0) exit 0 ;;
        200) exit 2 ;;
        75)
            echo "ziggurat: stopped, saved up to step ${{reached:-0}}: back to the queue" >&2
            trap '' TERM
            scontrol requeue "$SLURM_JOB_ID"
            exit 75
            ;;
    esac
    [ "$reached" = "$before" ] && in_vain=$((in_vain + 1)) || in_vain=0
    if [ $in_vain -gt 3 ]; then
        echo "ziggurat: failed, and nothing new saved in $in_vain starts: given up" >&2
        exit 1
    fi
    echo "ziggurat: failed, saved up to step ${{reached:-0}}: starting again in $((2 ** in_vain)) s" >&2
    sleep $((2 ** in_vain))
    until srun true; do
        echo "ziggurat: a node does not answer; Slurm puts the job back into the queue once it notices" >&2
        sleep 30
    done
done
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of `ziggurat launch slurm`."""
    parser.add_argument("--nodes", type=int, default=1, metavar="N", help="number of nodes [1]")
    help = "processes of a node, which share its GPUs evenly [1]"
    parser.add_argument("--tasks-per-node", type=int, default=1, metavar="N", help=help)
    parser.add_argument("--gpus-per-node", type=int, metavar="N", help="GPUs of each node [none]")
    parser.add_argument("--cpus-per-task", type=int, metavar="N", help="CPUs of a process [what the cluster gives]")
    parser.add_argument(
        "--time", type=one_line, metavar="LIMIT", help="as sbatch takes it, as in 1-00:00:00 [the partition's]"
    )
    parser.add_argument(
        "--partition", type=one_line, metavar="NAME", help="partition that runs the job [the cluster's default]"
    )
    parser.add_argument("--account", type=one_line, metavar="NAME", help="account that pays [the user's default]")
    help = "a further option of sbatch, as in --sbatch=--qos=high; it overrides those of the script"
    parser.add_argument("--sbatch", type=one_line, action="append", default=[], metavar="OPTION", help=help)
    parser.add_argument(
        "--container-image", type=one_line, metavar="IMAGE", help="run in it (pyxis); ziggurat is on its PATH"
    )
    parser.add_argument(
        "--container-mounts", type=one_line, metavar="FROM:TO,…", help="besides this folder, which is always mounted"
    )
    parser.add_argument("--output", type=path, metavar="FILE", help="file of the script [standard output]")
    parser.add_argument("--submit", action="store_true", help="submit it, and print the number of the job")
    parser.add_argument("command", nargs="*", metavar="COMMAND", help="pretrain with its flags, after --")


def run(arguments: argparse.Namespace) -> int:
    """Writes the script, or submits it."""
    text = script(arguments, Path.cwd())
    if arguments.output or not arguments.submit:
        write_submission(text, arguments.output, MADE_BY)
    if arguments.submit:
        print(submit(text))
    return 0


def script(arguments: argparse.Namespace, folder: Path) -> str:
    """Returns the script of a job that works in a folder. Raises InputError with all that is wrong with the flags."""
    if problems := flag_problems(arguments):
        raise InputError("\n".join(problems))
    if problem := name_problem(str(folder)):
        raise InputError(f"{folder}: the folder of the job {problem}")
    config = check_command(arguments.command, arguments.gpus_per_node and arguments.gpus_per_node * arguments.nodes)
    run_dir = Path(config.train.run_dir).expanduser()
    job = Path(os.path.abspath(run_dir)).name or "ziggurat"
    # In the name of a log sbatch takes % for a pattern, which a backslash would turn off.
    log_file = job.replace("%", "%%").replace("\\", "_") + "-%j.log"
    options = {"job-name": job, "nodes": arguments.nodes, "ntasks-per-node": arguments.tasks_per_node}
    same_names = ("gpus-per-node", "cpus-per-task", "time", "partition", "account")
    options |= {name: getattr(arguments, name.replace("-", "_")) for name in same_names}
    options |= {"chdir": folder, "output": log_file, "open-mode": "append"}
    options["signal"] = f"TERM@{NOTICE_SECONDS}"
    lines = [f"--{name}={shlex.quote(str(value))}" for name, value in options.items() if value is not None]
    flags = ["--label", "--kill-on-bad-exit=0", f"--wait={WAIT_SECONDS}"]
    if arguments.cpus_per_task:
        # srun does not inherit this option from sbatch.
        flags.append(f"--cpus-per-task={arguments.cpus_per_task}")
    program = [sys.executable, "-P", "-m", "launch.cli"]
    if arguments.container_image:
        mounts = ",".join(filter(None, (f"{folder}:{folder}", arguments.container_mounts)))
        flags += [f"--container-image={arguments.container_image}", f"--container-mounts={mounts}",
                  f"--container-workdir={folder}"]  # fmt: skip
        program = ["ziggurat"]
    return SCRIPT.format(
        made_by=MADE_BY,
        # Of two lines with the same option the later one counts.
        lines="\n".join(f"#SBATCH {option}" for option in [*lines, "--requeue", *arguments.sbatch]),
        srun=shlex.join(["srun", *flags]),
        task=shlex.quote(TASK),
        command=shlex.join([*program, *arguments.command]),
        saved=newest_step_command(run_dir, config.checkpoint.dir),
    )


def flag_problems(arguments: argparse.Namespace) -> list[str]:
    """Returns what is wrong with the flags."""
    problems = too_small(arguments, dict.fromkeys(("nodes", "tasks-per-node", "gpus-per-node", "cpus-per-task"), 1))
    for option in arguments.sbatch:
        if not option.startswith("-"):
            problems.append(f"--sbatch={option}: an option begins with -")
    tasks, gpus = arguments.tasks_per_node, arguments.gpus_per_node
    if not problems and gpus and gpus % tasks:
        problems.append(f"--tasks-per-node={tasks} does not divide --gpus-per-node={gpus}")
    if arguments.container_mounts and not arguments.container_image:
        problems.append("--container-mounts without --container-image: there is nothing to mount it in")
    return problems


def newest_step_command(run_dir: Path, checkpoint_dir: str | None) -> str:
    """Returns a shell command that prints the step of the newest checkpoint (see `launch.local.newest_step`)."""
    if checkpoint_dir and protocol(checkpoint_dir):
        file = shlex.quote(str(run_dir / "events.jsonl"))
        return f"""grep -o '"save", "step": [0-9]*' {file} 2>/dev/null | tail -n 1 | grep -o '[0-9]*$'"""
    folder = shlex.quote(str(Path(checkpoint_dir or run_dir / "checkpoints").expanduser()))
    return f"ls {folder} 2>/dev/null | grep -E '^[0-9]+$' | sort -n | tail -n 1"


def submit(text: str, sbatch: Sequence[str] = ("sbatch", "--parsable")) -> str:
    """Submits a script to Slurm; returns the number of the job. Raises InputError where Slurm refuses it."""
    if shutil.which(sbatch[0]) is None:
        raise InputError(f"--submit: there is no {sbatch[0]} here; write the script and submit it where Slurm is")
    done = subprocess.run(sbatch, input=text, capture_output=True, text=True)
    if done.returncode:
        raise InputError(done.stderr.strip() or f"{sbatch[0]} ended with status {done.returncode}")
    return done.stdout.strip().partition(";")[0]
