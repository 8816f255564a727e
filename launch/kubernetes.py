"""Run pretraining on Kubernetes:

    ziggurat launch kubernetes --topology=h100:2x8 --image=IMAGE --volume=CLAIM:/runs \\
        -- pretrain --config=small --config.train.run_dir=/runs/small | kubectl apply -f -

Writes the manifest of a JobSet (jobset.sigs.k8s.io, which the cluster must have) to standard output. There is a process
a pod and a pod a host. What a pod's exit status says is done by Kubernetes: see `manifest`.
"""

import argparse
import math
import re
import shlex
from collections.abc import Mapping
from pathlib import PurePosixPath
from typing import Any

from data.errors import InputError
from launch.local import PREEMPTED, USERS_ERROR
from launch.submission import checked, put

PORT = 8476
# GKE's names of the accelerators that `--topology` names.
TPUS = {"v4": "tpu-v4-podslice", "v5e": "tpu-v5-lite-podslice", "v5p": "tpu-v5p-slice", "v6e": "tpu-v6e-slice"}
# A step and a save, when a pod is asked to end.
GRACE_SECONDS = 300
# The holder of a run's folder writes lease.json every five seconds. Before it is taken an older one may lie there.
STALE_MINUTES, START_SECONDS = 5, 1800


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `ziggurat launch kubernetes`."""
    parser.add_argument(
        "--topology", required=True, metavar="CHIP:SHAPE",
        help="as `ziggurat plan` takes it: v6e:16x16 (the chips of a slice) or h100:2x8 (hosts × GPUs of each)",
    )  # fmt: skip
    parser.add_argument("--slices", type=int, default=1, metavar="N", help="of TPUs [1]")
    parser.add_argument("--image", required=True, metavar="IMAGE", help="a container that has ziggurat on its PATH")
    parser.add_argument(
        "--volume", required=True, metavar="CLAIM:PATH",
        help="a persistent volume claim that all pods can write to (ReadWriteMany), and where it is mounted",
    )  # fmt: skip
    parser.add_argument("--name", metavar="NAME", help="of the JobSet [from the name of the run's folder]")
    parser.add_argument(
        "--node-selector", action="append", default=[], metavar="LABEL=VALUE",
        help="a label that the nodes must have, besides those of TPUs",
    )  # fmt: skip
    parser.add_argument(
        "--restarts", type=int, default=20, metavar="N", help="after faults, in the whole of the run [20]"
    )
    parser.add_argument("--output", metavar="FILE", help="where the manifest goes [standard output]")
    parser.add_argument("command", nargs="*", metavar="COMMAND", help="pretrain with its flags, after --")


def run(arguments: argparse.Namespace) -> int:
    """Write the manifest."""
    import yaml

    put(yaml.safe_dump(manifest(arguments), sort_keys=False, width=120), arguments.output)
    return 0


def manifest(arguments: argparse.Namespace) -> dict[str, Any]:
    """The JobSet: a replicated job of a pod for each host, and for each slice of TPUs such a job.

    A pod that ends with the user's error fails the whole. One that was stopped, or whose node is taken away, is made
    anew; so are all of them, by the same rule, since all stop together. Any other end is a fault: it fails the job, and
    the JobSet starts all pods again, `--restarts` times. Kubernetes does not see whether anything new has been saved.

    Raises:
        InputError: all that is wrong with the flags, or with the command.
    """
    from train.planning.topology import parse_topology

    chip, shape = parse_topology(arguments.topology, arguments.slices)
    count = math.prod(shape)
    if chip.platform == "tpu" and chip.name not in TPUS:
        raise InputError(f"--topology={arguments.topology}: Kubernetes has {', '.join(TPUS)}")
    each = shape[1] if chip.platform == "gpu" else devices_of_a_host(shape)
    config = checked(arguments.command, count * arguments.slices, arguments.slices)
    claim, _, mount = arguments.volume.partition(":")
    run_dir = PurePosixPath(config.train.run_dir)
    name = arguments.name or re.sub(r"[^a-z0-9]+", "-", run_dir.name.lower()).strip("-")
    problems = []
    if not claim or not mount.startswith("/"):
        problems.append(f"--volume={arguments.volume} must be CLAIM:PATH with an absolute path, as in training:/runs")
    elif not run_dir.is_relative_to(mount):
        problems.append(f"train.run_dir is {run_dir}, which would be lost with its pod; put it below {mount}")
    if not re.fullmatch(r"[a-z]([-a-z0-9]{0,38}[a-z0-9])?", name):
        problems.append(f"--name={name}: give at most 40 small letters, digits and dashes, a letter first")
    if arguments.restarts < 0:
        problems.append(f"--restarts={arguments.restarts} must be at least 0")
    problems += [f"--node-selector={pair} must be LABEL=VALUE" for pair in arguments.node_selector
                 if not re.fullmatch(r"[^=]+=[^=]*", pair)]  # fmt: skip
    if problems:
        raise InputError("\n".join(problems))

    selector = dict(pair.split("=") for pair in arguments.node_selector)
    environment: list[dict[str, Any]] = []
    if chip.platform == "tpu":
        # GKE tells a pod of a TPU who the others are; JAX reads that.
        selector |= {
            "cloud.google.com/gke-tpu-accelerator": TPUS[chip.name],
            "cloud.google.com/gke-tpu-topology": "x".join(map(str, shape)),
        }
    else:
        index = {"fieldRef": {"fieldPath": "metadata.annotations['batch.kubernetes.io/job-completion-index']"}}
        environment = [
            {"name": "ZIGGURAT_COORDINATOR", "value": f"{name}-train-0-0.{name}:{PORT}"},
            {"name": "ZIGGURAT_NUM_PROCESSES", "value": str(count // each)},
            {"name": "ZIGGURAT_PROCESS_ID", "valueFrom": index},
        ]
    pod = pod_spec(
        image=arguments.image,
        command=["ziggurat", *arguments.command],
        resource={"tpu": "google.com/tpu", "gpu": "nvidia.com/gpu"}[chip.platform],
        devices=each,
        environment=environment,
        selector=selector,
        volume=(claim, mount),
        lease=str(run_dir / "lease.json"),
    )
    on_exit = lambda status: {"containerName": "train", "operator": "In", "values": [status]}
    job = {
        "parallelism": count // each,
        "completions": count // each,
        "completionMode": "Indexed",
        "backoffLimit": 0,
        "podFailurePolicy": {
            "rules": [
                {"action": "FailJob", "onExitCodes": on_exit(USERS_ERROR)},
                {"action": "Ignore", "onExitCodes": on_exit(PREEMPTED)},
                {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]},
            ]
        },
        "template": {"spec": pod},
    }
    metadata: dict[str, Any] = {"name": name}
    if arguments.slices > 1:
        # Each slice of TPUs is a pool of nodes, which a job has alone.
        metadata["annotations"] = {"alpha.jobset.sigs.k8s.io/exclusive-topology": "cloud.google.com/gke-nodepool"}
    user_error = {"name": "usersError", "action": "FailJobSet", "onJobFailureReasons": ["PodFailurePolicy"]}
    return {
        "apiVersion": "jobset.x-k8s.io/v1alpha2",
        "kind": "JobSet",
        "metadata": metadata,
        "spec": {
            "network": {"enableDNSHostnames": True, "publishNotReadyAddresses": True},
            "failurePolicy": {"maxRestarts": arguments.restarts, "rules": [user_error]},
            "replicatedJobs": [{"name": "train", "replicas": arguments.slices, "template": {"spec": job}}],
        },
    }


def devices_of_a_host(shape: tuple[int, ...]) -> int:
    """TPUs of a host of a slice: four, but up to eight where the slice has but one host."""
    count = math.prod(shape)
    return count if count <= (8 if len(shape) == 2 else 4) else 4


def pod_spec(
    image: str,
    command: list[str],
    resource: str,
    devices: int,
    environment: list[dict[str, Any]],
    selector: Mapping[str, str],
    volume: tuple[str, str],
    lease: str,
) -> dict[str, Any]:
    """A pod with one process.

    That the run lives shows in its folder, on every pod: `lease.json`, where there is one, is not old. A process whose
    steps hang ends by itself (`train.watchdog_seconds`).

    Args:
        image: of its container.
        command: what it runs.
        resource: Kubernetes' name of its devices.
        devices: how many of them.
        environment: of the process.
        selector: labels of its node.
        volume: the claim, and where it is mounted.
        lease: the file that the run's first process writes anew every few seconds.
    """
    file = shlex.quote(lease)
    fresh = f'test ! -e {file} || test -n "$(find {file} -mmin -{STALE_MINUTES})"'
    probe = lambda: {"exec": {"command": ["sh", "-c", fresh]}, "timeoutSeconds": 30}
    volumes = [("runs", volume[1], {"persistentVolumeClaim": {"claimName": volume[0]}})]
    if resource == "nvidia.com/gpu":
        # GPUs of a host may speak through it, and a container's own is small.
        volumes.append(("shared-memory", "/dev/shm", {"emptyDir": {"medium": "Memory"}}))
    return {
        "restartPolicy": "Never",
        "terminationGracePeriodSeconds": GRACE_SECONDS,
        **({"nodeSelector": dict(selector)} if selector else {}),
        "tolerations": [{"key": resource, "operator": "Exists"}],
        "containers": [
            {
                "name": "train",
                "image": image,
                "command": command,
                **({"env": environment} if environment else {}),
                "resources": {"limits": {resource: str(devices)}},
                "startupProbe": {**probe(), "periodSeconds": 10, "failureThreshold": START_SECONDS // 10},
                "livenessProbe": {**probe(), "periodSeconds": 60, "failureThreshold": 3},
                "volumeMounts": [{"name": name, "mountPath": path} for name, path, _ in volumes],
            }
        ],
        "volumes": [{"name": name, **what} for name, _, what in volumes],
    }
