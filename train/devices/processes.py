"""The processes of a run find each other by what the environment tells: `ziggurat launch`, Slurm, or a TPU pod.

JAX is imported as they join and not before: a launcher, which forks, shares out GPUs by the same rule.
"""

import json
import os
import re
import urllib.request
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from data.errors import InputError


def on_first_process(action: Callable[[], Any]) -> None:
    """Process 0 does it; the others wait until it is done."""
    if jax.process_index() == 0:
        action()
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices("once")


def all_gather_json(value: Any) -> list[Any]:
    """The values of all processes, which JSON can hold, by process; all call it together."""
    if jax.process_count() == 1:
        return [value]
    mine = np.frombuffer(json.dumps(value).encode(), np.uint8)
    sizes = multihost_utils.process_allgather(np.array([mine.size]))[:, 0]
    padded = np.zeros(sizes.max(), np.uint8)
    padded[: mine.size] = mine
    everyones = multihost_utils.process_allgather(padded)
    return [json.loads(text[:size].tobytes()) for text, size in zip(everyones, sizes.tolist(), strict=True)]


def broadcast_json(make: Callable[[], Any]) -> Any:
    """A value that JSON can hold, made by process 0 for all."""
    return all_gather_json(make() if jax.process_index() == 0 else None)[0]


JOIN_VARIABLES = ("ZIGGURAT_COORDINATOR", "ZIGGURAT_NUM_PROCESSES", "ZIGGURAT_PROCESS_ID")
SLURM_VARIABLES = ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_STEP_TASKS_PER_NODE", "SLURM_NODEID", "SLURM_PROCID",
         "SLURM_LOCALID")  # fmt: skip
METADATA_SECONDS = 2.0
# Hosts of a cluster come minutes apart, each with its image to load.
JOIN_SECONDS = 900


def join_processes() -> None:
    """Connect to the other processes of this run, where there are any. InputError where what is told cannot be."""
    joining = how_to_join(os.environ)
    if joining is None:
        return
    import jax

    # It would take SIGTERM as a notice of preemption, which nothing here acts on: the process would not end.
    jax.config.update("jax_enable_preemption_service", False)
    jax.distributed.initialize(**joining, initialization_timeout=JOIN_SECONDS)


def how_to_join(environment: Mapping[str, str]) -> dict[str, Any] | None:
    """What `jax.distributed.initialize` takes; none: this process is alone.

    Variables of this project come first, then those of a Slurm step, then a TPU pod.

    Raises:
        InputError: variables that are missing or malformed.
    """
    if any(environment.get(name) for name in JOIN_VARIABLES):
        return join_by_variables(environment)
    # A batch script or an interactive shell inside an allocation has many tasks to give away, but is none of them.
    if "SLURM_STEP_NUM_TASKS" in environment and whole_number(environment, "SLURM_STEP_NUM_TASKS") > 1:
        return join_slurm_step(environment)
    return {} if is_tpu_pod(environment) else None


def join_by_variables(environment: Mapping[str, str]) -> dict[str, Any]:
    """The three variables of NAMES: host:port of process 0, how many processes there are, and which this one is."""
    if missing := [name for name in JOIN_VARIABLES if not environment.get(name)]:
        given = ", ".join(name for name in JOIN_VARIABLES if environment.get(name))
        raise InputError(f"{', '.join(missing)}: not set, but {given}; the three go together")
    if not re.fullmatch(r".+:\d+", environment[JOIN_VARIABLES[0]]):
        raise InputError(f"{NAMES[0]}={environment[NAMES[0]]} must be the host and port of process 0, as in node1:8476")
    number, process = (whole_number(environment, name) for name in JOIN_VARIABLES[1:])
    if process >= number:
        raise InputError(f"{NAMES[2]}={process} must be less than {NAMES[1]}={number}")
    return {
        "coordinator_address": environment[JOIN_VARIABLES[0]],
        "num_processes": number,
        "process_id": process,
        # Else JAX would look around for what it has not been given, and find this process in a Slurm job.
        "cluster_detection_method": "deactivate",
    }


def join_slurm_step(environment: Mapping[str, str]) -> dict[str, Any]:
    """A task of an `srun` step. JAX itself finds process 0, on the first node of the step."""
    if missing := [name for name in SLURM_VARIABLES if not environment.get(name)]:
        raise InputError(f"{', '.join(missing)}: not set, but SLURM_STEP_NUM_TASKS; start processes with srun")
    here = tasks_on_nodes(environment["SLURM_STEP_TASKS_PER_NODE"])[whole_number(environment, "SLURM_NODEID")]
    return {
        "num_processes": whole_number(environment, "SLURM_STEP_NUM_TASKS"),
        "process_id": whole_number(environment, "SLURM_PROCID"),
        # JAX would take one device a task, also of a task that has its node alone; an empty list: all that it sees.
        "local_device_ids": share_of_gpus(environment, whole_number(environment, "SLURM_LOCALID"), here) or [],
        "cluster_detection_method": "slurm",
    }


def whole_number(environment: Mapping[str, str], name: str) -> int:
    """A variable that is a whole number."""
    if not re.fullmatch(r"\d+", environment[name]):
        raise InputError(f"{name}={environment[name]} must be a whole number")
    return int(environment[name])


def tasks_on_nodes(text: str) -> list[int]:
    """Slurm's short form: "2(x3),1" → [2, 2, 2, 1]."""
    parts = (re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part) for part in text.split(","))
    return [int(part[1]) for part in parts if part for _ in range(int(part[2] or 1))]


def share_of_gpus(environment: Mapping[str, str], process: int, processes: int) -> list[int] | None:
    """Which of a machine's NVIDIA GPUs one of its processes takes; none: all that it sees.

    Args:
        environment: CUDA_VISIBLE_DEVICES says what is seen, SLURM_GPUS_ON_NODE what all processes of the node see.
        process: its number among those of this machine.
        processes: of this machine.

    Raises:
        InputError: they cannot be shared evenly.
    """
    seen = gpus_seen(environment)
    if processes == 1 or not seen or environment.get("JAX_PLATFORMS") == "cpu":
        return None
    if seen < int(environment.get("SLURM_GPUS_ON_NODE", seen)):
        return None  # Slurm has shown each task only its own.
    if seen % processes:
        raise InputError(f"{processes} processes cannot share the {seen} GPUs of a machine evenly; start as many as "
                         f"divide {seen}, or show them other GPUs by CUDA_VISIBLE_DEVICES")  # fmt: skip
    each = seen // processes
    return [*range(process * each, (process + 1) * each)]


def gpus_seen(environment: Mapping[str, str]) -> int:
    """How many NVIDIA GPUs a process here sees."""
    shown = environment.get("CUDA_VISIBLE_DEVICES")
    if shown is not None:
        return len([name for name in shown.split(",") if name.strip() not in ("", "-1", "NoDevFiles")])
    return len([*Path("/dev").glob("nvidia[0-9]*")])


def is_tpu_pod(environment: Mapping[str, str]) -> bool:
    """Whether this is one of several hosts with TPUs, as Google's Kubernetes or Compute Engine tell.

    JAX finds the rest. It has set TPU_SKIP_MDS_QUERY where the machine has no TPU.
    """
    platforms = environment.get("JAX_PLATFORMS", "")
    if platforms and "tpu" not in platforms:
        return False
    hosts = environment.get("TPU_PROCESS_ADDRESSES") or environment.get("TPU_WORKER_HOSTNAMES")
    slices = environment.get("MEGASCALE_NUM_SLICES")
    if hosts is None and slices is None and "TPU_SKIP_MDS_QUERY" not in environment:
        server = environment.get("GCE_METADATA_IP", "metadata.google.internal")
        hosts = compute_engine_attribute(server, "worker-network-endpoints")
        found = re.search(
            r"^MEGASCALE_NUM_SLICES: '?(\d+)", compute_engine_attribute(server, "tpu-env") if hosts else "", re.M
        )
        slices = found[1] if found else None
    return "," in (hosts or "") or (slices or "1") != "1"


def compute_engine_attribute(server: str, key: str) -> str:
    """What Compute Engine tells a machine of itself; empty where it has nothing to say, or this is no such machine."""
    url = f"http://{server}/computeMetadata/v1/instance/attributes/{key}"
    request = urllib.request.Request(url, headers={"Metadata-Flavor": "Google"})
    try:
        with urllib.request.urlopen(request, timeout=METADATA_SECONDS) as answer:
            return str(answer.read().decode())
    except OSError:
        return ""
