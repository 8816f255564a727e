"""The manifest of a JobSet: its fields, its schemas, and the file that its probe reads."""

import argparse
import json
import os
import re
import subprocess
import time
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from data.errors import InputError
from launch.commands import parse
from launch.kubernetes import manifest, tpus_per_host, unexpanded
from tests.launch.small_run import here
from tests.peers import require
from train.devices.processes import join_arguments

GPUS = ["--topology=h100:4x8", "--image=me/ziggurat:1", "--volume=training:/runs", "--node-selector=gpu=h100"]
TPUS = ["--topology=v6e:4x4", "--slices=2", "--image=me/ziggurat:1", "--volume=training:/runs"]
PRETRAIN = ["--", "pretrain", "--config=llama2_7b", "--config.data.corpus=/runs/texts",
            "--config.train.run_dir=/runs/Llama_2 a"]  # fmt: skip


def arguments(*flags: str) -> argparse.Namespace:
    return parse(["launch", "kubernetes", *flags])[1]


def written(*flags: str) -> dict:
    command = [] if "--" in flags else PRETRAIN
    return manifest(arguments(*flags, *command))


def job_of(jobset: dict) -> dict:
    [job] = jobset["spec"]["replicatedJobs"]
    return job["template"]["spec"]


def container_of(jobset: dict) -> dict:
    [container] = job_of(jobset)["template"]["spec"]["containers"]
    return container


def expanded(word: str, variables: dict[str, str]) -> str:
    """What Kubernetes makes of a word of a command: third_party/forked/golang/expansion/expand.go."""
    return re.sub(
        r"\$\$|\$\(([^)]*)\)", lambda m: "$" if m[1] is None else variables.get(m[1], m[0]), word, flags=re.DOTALL
    )


@given(st.lists(st.text("$(){}AB 'x"), max_size=3))
def test_kubernetes_hands_each_process_the_words_that_were_given(words: list[str]):
    assert [expanded(unexpanded(word), {"A": "1", "AB": "2"}) for word in words] == words


def test_a_command_reaches_the_pod_as_it_was_given():
    hook = "--config.train.on_event=echo $$ $(ZIGGURAT_PROCESS_ID) $HOME"
    [*_, word] = container_of(manifest(arguments(*GPUS, *PRETRAIN, hook)))["command"]
    assert expanded(word, {"ZIGGURAT_PROCESS_ID": "3"}) == hook


@pytest.mark.parametrize("flags", [GPUS, TPUS], ids=["gpu", "tpu"])
def test_the_published_schemas_know_every_field(flags: list[str]):
    """The JobSet's schema is in classes that are generated from it, those of the Job and its pods in JSON."""
    validate, models = require("kubernetes_validate"), require("kubeflow_trainer_api.models")
    jobset = written(*flags)
    # What a class does not know it drops.
    assert models.JobsetV1alpha2JobSet.from_dict(jobset).to_dict() == jobset
    job = {"apiVersion": "batch/v1", "kind": "Job", "metadata": jobset["metadata"], "spec": job_of(jobset)}
    validate.validate(job, "1.37", strict=True)
    container_of(jobset)["livenesProbe"] = {}
    assert models.JobsetV1alpha2JobSet.from_dict(jobset).to_dict() != jobset
    with pytest.raises(validate.ValidationError):
        validate.validate(job, "1.37", strict=True)


def test_what_is_printed_is_the_manifest(capsys):
    assert here("launch", "kubernetes", *GPUS, *PRETRAIN) == 0
    assert yaml.safe_load(capsys.readouterr().out) == written(*GPUS)


def test_pods_with_gpus_are_told_who_they_are():
    jobset = written(*GPUS)
    assert jobset["metadata"]["name"] == "llama-2-a"
    assert (job_of(jobset)["parallelism"], job_of(jobset)["completions"]) == (4, 4)
    container, pod = container_of(jobset), job_of(jobset)["template"]["spec"]
    assert container["command"] == ["ziggurat", *PRETRAIN[1:]]
    assert container["resources"] == {"limits": {"nvidia.com/gpu": "8"}}
    assert pod["nodeSelector"] == {"gpu": "h100"}
    index = "metadata.annotations['batch.kubernetes.io/job-completion-index']"
    told = {each["name"]: each.get("value") or each["valueFrom"]["fieldRef"]["fieldPath"] for each in container["env"]}
    assert told.pop("ZIGGURAT_PROCESS_ID") == index
    # JobSet's name of the first pod of its first job, in the network that has the JobSet's own name.
    assert told["ZIGGURAT_COORDINATOR"] == "llama-2-a-train-0-0.llama-2-a:8476"
    joining = join_arguments(told | {"ZIGGURAT_PROCESS_ID": "3"})
    assert joining is not None
    assert joining["num_processes"] == 4


def test_pods_with_tpus_are_placed_and_left_to_be_told_by_gke():
    jobset = written(*TPUS)
    assert jobset["spec"]["replicatedJobs"][0]["replicas"] == 2
    assert (job_of(jobset)["parallelism"], job_of(jobset)["completions"]) == (4, 4)
    assert job_of(jobset)["template"]["spec"]["nodeSelector"] == {
        "cloud.google.com/gke-tpu-accelerator": "tpu-v6e-slice",
        "cloud.google.com/gke-tpu-topology": "4x4",
    }
    assert container_of(jobset)["resources"] == {"limits": {"google.com/tpu": "4"}}
    assert "env" not in container_of(jobset)
    assert list(jobset["metadata"]["annotations"].values()) == ["cloud.google.com/gke-nodepool"]
    # A TPU7x is two devices, of which a mesh of one host then has eight.
    dies = written("--topology=tpu7x:2x2x1", *TPUS[2:], *PRETRAIN, "--config.mesh.fsdp=8")
    assert container_of(dies)["resources"] == {"limits": {"google.com/tpu": "4"}}
    assert list(map(tpus_per_host, [(1, 1), (2, 2), (2, 4), (4, 4), (2, 2, 1), (2, 2, 2)])) == [1, 4, 8, 4, 4, 4]


def test_what_happens_follows_from_the_exit_status():
    jobset = written(*GPUS, "--restarts=7")
    job = job_of(jobset)
    assert job["backoffLimit"] == 0
    rules = [(rule["action"], rule.get("onExitCodes", {}).get("values")) for rule in job["podFailurePolicy"]["rules"]]
    assert rules == [("FailJob", [2]), ("Ignore", [75]), ("Ignore", None)]
    assert jobset["spec"]["failurePolicy"] == {
        "maxRestarts": 7,
        "rules": [{"name": "usersError", "action": "FailJobSet", "onJobFailureReasons": ["PodFailurePolicy"]}],
    }
    assert job["template"]["spec"]["restartPolicy"] == "Never"


def test_a_pod_lives_while_the_run_shows_that_it_does(tmp_path: Path):
    folder = tmp_path / "a run"
    folder.mkdir()
    flags = [*GPUS[:2], f"--volume=training:{tmp_path}", "--", "pretrain", "--config=llama2_7b",
             "--config.data.corpus=texts", f"--config.train.run_dir={folder}"]  # fmt: skip
    container = container_of(manifest(arguments(*flags)))
    [probe] = {json.dumps(container[name]["exec"]["command"]) for name in ("livenessProbe", "startupProbe")}

    def lives() -> bool:
        return subprocess.run([expanded(word, {}) for word in json.loads(probe)]).returncode == 0

    assert lives()  # it has not begun, or has ended
    (folder / "lease.json").write_text("{}")
    assert lives()
    os.utime(folder / "lease.json", (time.time() - 600,) * 2)
    assert not lives()


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--topology=h100:4x8", "--volume=training"], "--volume=training must be CLAIM:PATH with an absolute path"),
        (["--topology=h100:4x8", "--volume=training:/data"], "train.run_dir is /runs/Llama_2 a, which would be lost"),
        (["--topology=h100:4x8", "--volume=a:/runs", "--name=A_b"], "--name=A_b: give at most 40 small letters"),
        (["--topology=h100:4x8", "--volume=a:/runs", "--node-selector=h100"],
         "--node-selector=h100 must be LABEL=VALUE"),
        (["--topology=h100:4x8", "--volume=a:/runs", "--restarts=-1"], "--restarts=-1 must be at least 0"),
        (["--topology=h300:4x8", "--volume=a:/runs"], "unknown chip 'h300'"),
        (["--topology=h100:3x8", "--volume=a:/runs"], "cannot be shared by mesh.fsdp = 24"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said_before_anything_is_applied(flags: list[str], words: str):
    with pytest.raises(InputError) as caught:
        written("--image=me/ziggurat:1", *flags)
    assert words in str(caught.value)
