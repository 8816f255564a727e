"""The processes of a run: how they join by `ziggurat launch`, Slurm or a TPU pod, and share a machine's GPUs.

JAX is imported only when a process joins: the launcher, which shares out GPUs by the same rule, does without.
"""

import os
import re
import socket
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from data.errors import Fault, InputError

JOIN_VARIABLES = ("ZIGGURAT_COORDINATOR", "ZIGGURAT_NUM_PROCESSES", "ZIGGURAT_PROCESS_ID")
SLURM_VARIABLES = ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_STEP_TASKS_PER_NODE", "SLURM_NODEID", "SLURM_PROCID",
         "SLURM_LOCALID")  # fmt: skip


def join_processes() -> None:
    """Connects to the other processes of this run, if there are any. Raises InputError as `join_arguments`."""
    joining = join_arguments(os.environ)
    if joining is None:
        return
    import jax

    # Otherwise JAX takes SIGTERM as a notice of preemption, which nothing acts on, and the process does not end.
    jax.config.update("jax_enable_preemption_service", False)
    # Hosts of a cluster join minutes apart, because each loads its image.
    if joining.get("process_id") == 0 and (address := joining.get("coordinator_address")):
        check_port(joining.get("coordinator_bind_address", ""), int(address.rsplit(":", 1)[1]))
    try:
        jax.distributed.initialize(**joining, initialization_timeout=900)
    except (RuntimeError, ValueError) as error:
        raise Fault(f"the processes of this run cannot join: {str(error).splitlines()[0]}; start them again") from error


def check_port(bind_address: str, port: int) -> None:
    """Raises Fault where the coordinator cannot listen on its port: JAX's own would crash."""
    host = bind_address.rpartition(":")[0].strip("[]")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        socket.create_server((host, port), family=family).close()
    except (OSError, OverflowError) as error:
        raise Fault(f"port {port} of the coordinator cannot be opened: {error}; start again with a free one") from None


def join_arguments(environment: Mapping[str, str]) -> dict[str, Any] | None:
    """Returns the arguments of `jax.distributed.initialize`, or None if this process is alone.

    Variables of this project come first, then those of a Slurm step, then a TPU pod. Raises InputError if variables are
    missing or malformed.
    """
    if any(environment.get(name) for name in JOIN_VARIABLES):
        return explicit_join(environment)
    # A batch script or an interactive shell inside an allocation can start many tasks, but is none of them.
    if "SLURM_STEP_NUM_TASKS" in environment and whole_number(environment, "SLURM_STEP_NUM_TASKS") > 1:
        return slurm_join(environment)
    return {} if is_tpu_pod(environment) else None


def explicit_join(environment: Mapping[str, str]) -> dict[str, Any]:
    """Returns the join arguments of JOIN_VARIABLES: host:port of process 0, number of processes, and own number."""
    if missing := [name for name in JOIN_VARIABLES if not environment.get(name)]:
        present = ", ".join(name for name in JOIN_VARIABLES if environment.get(name))
        raise InputError(f"{', '.join(missing)}: not set, but {present}; the three go together")
    address, num_processes, process_id = JOIN_VARIABLES
    if not re.fullmatch(r"\S+:[0-9]{1,5}", environment[address]):
        raise InputError(f"{address}={environment[address]} must be the host and port of process 0, as in node1:8476")
    host, port = environment[address].rsplit(":", 1)
    number = whole_number(environment, num_processes)
    process = whole_number(environment, process_id)
    if process >= number:
        raise InputError(f"{process_id}={process} must be less than {num_processes}={number}")
    return {
        "num_processes": number,
        "process_id": process,
        # Otherwise JAX looks for missing arguments itself, and may find this process in a Slurm job.
        "cluster_detection_method": "deactivate",
        **coordinator_at(host, port),
    }


def slurm_join(environment: Mapping[str, str]) -> dict[str, Any]:
    """Returns the join arguments of a task of an `srun` step. JAX itself finds process 0, on the first node."""
    if missing := [name for name in SLURM_VARIABLES if not environment.get(name)]:
        raise InputError(f"{', '.join(missing)}: not set, but SLURM_STEP_NUM_TASKS; start processes with srun")
    tasks = tasks_on_nodes(environment["SLURM_STEP_TASKS_PER_NODE"])
    node = whole_number(environment, "SLURM_NODEID")
    if node >= len(tasks):
        given = environment["SLURM_STEP_TASKS_PER_NODE"]
        raise InputError(
            f"SLURM_NODEID={node}: SLURM_STEP_TASKS_PER_NODE={given} has {len(tasks)} nodes; start with srun"
        )
    num_tasks = tasks[node]
    # The port that JAX itself takes for a job.
    port = environment.get("JAX_COORDINATOR_PORT") or str(61440 + whole_number(environment, "SLURM_JOB_ID") % 4096)
    return {
        **(coordinator_at("127.0.0.1", port) if len(tasks) == 1 else {}),
        "num_processes": whole_number(environment, "SLURM_STEP_NUM_TASKS"),
        "process_id": whole_number(environment, "SLURM_PROCID"),
        # By default JAX takes one device a task, even if the task has its node alone. An empty list means all devices.
        "local_device_ids": share_of_gpus(environment, whole_number(environment, "SLURM_LOCALID"), num_tasks) or [],
        "cluster_detection_method": "slurm",
    }


def coordinator_at(host: str, port: str) -> dict[str, str]:
    """Returns the join arguments of a coordinator. JAX's own listens on all interfaces, without any authentication."""
    at = {"coordinator_address": f"{host}:{port}"}
    is_local = host in ("127.0.0.1", "localhost", "[::1]")
    return at | {"coordinator_bind_address": f"{host}:{port}"} if is_local else at


def whole_number(environment: Mapping[str, str], name: str) -> int:
    """Returns a variable that must be a whole number."""
    if not re.fullmatch(r"[0-9]{1,18}", environment[name]):
        raise InputError(f"{name}={environment[name]} must be a whole number")
    return int(environment[name])


def tasks_on_nodes(text: str) -> list[int]:
    """Expands Slurm's short form: "2(x3),1" → [2, 2, 2, 1]."""
    parts = [re.fullmatch(r"([0-9]{1,9})(?:\(x([0-9]{1,6})\))?", part) for part in text.split(",")]
    if None in parts:
        raise InputError(f"SLURM_STEP_TASKS_PER_NODE={text} must be numbers of tasks, as in 2(x3),1; start with srun")
    return [int(part[1]) for part in parts if part for _ in range(int(part[2] or 1))]


def share_of_gpus(environment: Mapping[str, str], process: int, processes: int) -> list[int] | None:
    """Returns which of a machine's NVIDIA GPUs one of its processes takes, or None for all that it sees.

    Processes on this machine are numbered from 0. CUDA_VISIBLE_DEVICES names the visible GPUs, SLURM_GPUS_ON_NODE
    counts all of the node. Raises InputError if the GPUs cannot be shared evenly.
    """
    shown = environment.get("CUDA_VISIBLE_DEVICES")
    if shown is None:
        seen = len([*Path("/dev").glob("nvidia[0-9]*")])
    else:
        seen = len([name for name in shown.split(",") if name.strip() not in ("", "-1", "NoDevFiles")])
    if processes == 1 or not seen or environment.get("JAX_PLATFORMS") == "cpu":
        return None
    if "SLURM_GPUS_ON_NODE" in environment and seen < whole_number(environment, "SLURM_GPUS_ON_NODE"):
        return None  # Slurm has shown each task only its own.
    if seen % processes:
        raise InputError(f"{processes} processes cannot share the {seen} GPUs of a machine evenly; start a number that "
                         f"divides {seen}, or make other GPUs visible by CUDA_VISIBLE_DEVICES")  # fmt: skip
    each = seen // processes
    return [*range(process * each, (process + 1) * each)]


def is_tpu_pod(environment: Mapping[str, str]) -> bool:
    """Returns True if this is one of several hosts with TPUs, by Google's Kubernetes or Compute Engine.

    JAX finds all else. It has set TPU_SKIP_MDS_QUERY if the machine has no TPU.
    """
    platforms = environment.get("JAX_PLATFORMS", "")
    if platforms and "tpu" not in platforms:
        return False
    hosts = environment.get("TPU_PROCESS_ADDRESSES") or environment.get("TPU_WORKER_HOSTNAMES")
    slices = environment.get("MEGASCALE_NUM_SLICES")
    if hosts is None and slices is None and "TPU_SKIP_MDS_QUERY" not in environment:
        server = environment.get("GCE_METADATA_IP", "metadata.google.internal")
        hosts = compute_engine_attribute(server, "worker-network-endpoints")
        attributes = compute_engine_attribute(server, "tpu-env") if hosts else ""
        match = re.search(r"^MEGASCALE_NUM_SLICES: '?(\d+)", attributes, re.M)
        slices = match[1] if match else None
    return "," in (hosts or "") or (slices or "1") != "1"


def compute_engine_attribute(server: str, key: str) -> str:
    """Reads an attribute from Compute Engine's metadata server; empty if there is no such attribute or server."""
    url = f"http://{server}/computeMetadata/v1/instance/attributes/{key}"
    request = urllib.request.Request(url, headers={"Metadata-Flavor": "Google"})
    try:
        with urllib.request.urlopen(request, timeout=2.0) as answer:
            return str(answer.read().decode())
    except OSError:
        return ""
