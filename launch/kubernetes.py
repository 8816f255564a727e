"""Run pretraining on Kubernetes:

    ziggurat launch kubernetes --topology=h100:2x8 --image=IMAGE --volume=CLAIM:/runs \\
        -- pretrain --config=small --config.train.run_dir=/runs/small | kubectl apply -f -

Writes the manifest of a JobSet (jobset.sigs.k8s.io, which must be installed in the cluster) to standard output, with a
pod for each host and one process a pod. Kubernetes acts on a pod's exit status: the user's error fails the JobSet; a
pod that was stopped, or whose node is taken away, is made again; any other end is a fault, after which all pods start
again, --restarts times. Kubernetes does not know whether anything new has been saved.
"""

import argparse
import json
import math
import re
import shlex
from importlib import resources
from pathlib import PurePosixPath
from string import Template
from typing import Any

from data.errors import InputError
from launch.arguments import one_line, path, too_small
from launch.submission import check_command, write_submission

# GKE's names of the TPUs that `--topology` names.
TPUS = {
    "v4": "tpu-v4-podslice",
    "v5e": "tpu-v5-lite-podslice",
    "v5p": "tpu-v5p-slice",
    "v6e": "tpu-v6e-slice",
    "tpu7x": "tpu7x",
}
RESOURCES = {"tpu": "google.com/tpu", "gpu": "nvidia.com/gpu"}
# The process that holds a run's folder renews its lease every five seconds.
STALE_MINUTES = 5
# By this line a later command recognizes a manifest that it may replace.
MADE_BY = "# Made by ziggurat launch kubernetes."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of `ziggurat launch kubernetes`."""
    help = "as `ziggurat plan` takes it: v6e:16x16 (the chips of a slice) or h100:2x8 (hosts × GPUs of each)"
    parser.add_argument("--topology", type=one_line, required=True, metavar="CHIP:SHAPE", help=help)
    parser.add_argument("--slices", type=int, default=1, metavar="N", help="TPU slices of this shape [1]")
    parser.add_argument(
        "--image", type=one_line, required=True, metavar="IMAGE", help="a container that has ziggurat on its PATH"
    )
    help = "a persistent volume claim that all pods can write to (ReadWriteMany), and where to mount it"
    parser.add_argument("--volume", type=one_line, required=True, metavar="CLAIM:PATH", help=help)
    parser.add_argument("--name", type=one_line, metavar="NAME", help="name of the JobSet [that of the run's folder]")
    help = "a label that the nodes must have, besides those of TPUs"
    parser.add_argument("--node-selector", type=one_line, action="append", default=[], metavar="LABEL=VALUE", help=help)
    help = "restarts after faults, in the whole run [20]"
    parser.add_argument("--restarts", type=int, default=20, metavar="N", help=help)
    parser.add_argument("--output", type=path, metavar="FILE", help="file of the manifest [standard output]")
    parser.add_argument("command", nargs="*", metavar="COMMAND", help="pretrain with its flags, after --")


def run(arguments: argparse.Namespace) -> int:
    """Writes the manifest."""
    import yaml

    text = yaml.safe_dump(manifest(arguments), sort_keys=False, width=120)
    write_submission(f"{MADE_BY}\n{text}", arguments.output, MADE_BY)
    return 0


def manifest(arguments: argparse.Namespace) -> dict[str, Any]:
    """Returns the JobSet. Raises InputError with everything that is wrong with the flags or the command."""
    import yaml

    from train.planning.topology import parse_topology

    chip, shape = parse_topology(arguments.topology, arguments.slices)
    if chip.platform == "tpu" and chip.name not in TPUS:
        raise InputError(f"--topology={arguments.topology}: Kubernetes has {', '.join(TPUS)}")
    num_chips = math.prod(shape)
    chips_per_host = shape[1] if chip.platform == "gpu" else tpus_per_host(shape)
    config = check_command(arguments.command, num_chips * chip.devices * arguments.slices, arguments.slices)
    run_dir = PurePosixPath(config.train.run_dir)
    name = arguments.name or re.sub(r"[^a-z0-9]+", "-", run_dir.name.lower()).strip("-")
    claim, _, mount = arguments.volume.partition(":")
    problems = too_small(arguments, {"restarts": 0})
    if not claim or not mount.startswith("/"):
        problems.append(f"--volume={arguments.volume} must be CLAIM:PATH with an absolute path, as in training:/runs")
    elif not run_dir.is_relative_to(mount):
        problems.append(f"train.run_dir is {run_dir}, which would be lost with its pod; put it below {mount}")
    if not re.fullmatch(r"[a-z]([-a-z0-9]{0,38}[a-z0-9])?", name):
        problems.append(f"--name={name}: give at most 40 small letters, digits and dashes, a letter first")
    for pair in arguments.node_selector:
        if not re.fullmatch(r"[^=]+=[^=]*", pair):
            problems.append(f"--node-selector={pair} must be LABEL=VALUE")
    if problems:
        raise InputError("\n".join(problems))

    selector = dict(pair.split("=") for pair in arguments.node_selector)
    if chip.platform == "tpu":
        selector["cloud.google.com/gke-tpu-accelerator"] = TPUS[chip.name]
        selector["cloud.google.com/gke-tpu-topology"] = "x".join(map(str, shape))
    lease = shlex.quote(str(run_dir / "lease.json"))
    values = {
        "image": arguments.image,
        "command": [unexpanded(word) for word in ("ziggurat", *arguments.command)],
        "resource": RESOURCES[chip.platform],
        "selector": selector,
        "claim": claim,
        "mount": mount,
        "is_lease_fresh": unexpanded(f'test ! -e {lease} || test -n "$(find {lease} -mmin -{STALE_MINUTES})"'),
        "hosts": num_chips // chips_per_host,
        "devices": chips_per_host,
        "slices": arguments.slices,
        "restarts": arguments.restarts,
    }
    template = Template(resources.files("launch").joinpath("kubernetes.yaml").read_text())
    # JSON is YAML, so that any text is quoted well.
    quoted = {key: json.dumps(value, ensure_ascii=False) for key, value in values.items()}
    jobset: dict[str, Any] = yaml.safe_load(template.substitute(quoted, name=name))
    pod = jobset["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]
    if arguments.slices == 1:
        del jobset["metadata"]["annotations"]
    if not selector:
        del pod["nodeSelector"]
    if chip.platform == "tpu":
        container = pod["containers"][0]
        del container["env"], container["volumeMounts"][1], pod["volumes"][1]
    return jobset


def unexpanded(word: str) -> str:
    """Returns a word of a command as Kubernetes takes it: it replaces $(NAME) there, and $$ by a $."""
    return word.replace("$", "$$")


def tpus_per_host(shape: tuple[int, ...]) -> int:
    """Returns the TPUs of each host of a slice: four, or up to eight where the slice is one host."""
    count = math.prod(shape)
    return count if count <= (8 if len(shape) == 2 else 4) else 4
