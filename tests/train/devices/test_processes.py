"""How processes join, by environments of real Slurm steps and others."""

import socket
import threading
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data.errors import Fault, InputError
from train.devices.processes import check_port, explicit_join, is_tpu_pod, join_arguments, share_of_gpus, tasks_on_nodes

EXPLICIT = {"ZIGGURAT_COORDINATOR": "node1:8476", "ZIGGURAT_NUM_PROCESSES": "4", "ZIGGURAT_PROCESS_ID": "3"}
# As Slurm 22.05 sets them: two nodes, two tasks a node, the third task. The batch script has the first part alone.
BATCH = {
    "SLURM_JOB_ID": "1", "SLURM_LOCALID": "0", "SLURM_NODEID": "0", "SLURM_NODELIST": "n[1-2]", "SLURM_NTASKS": "4",
    "SLURM_PROCID": "0", "SLURM_TASKS_PER_NODE": "2(x2)",
}  # fmt: skip
STEP = BATCH | {
    "SLURM_NODEID": "1", "SLURM_PROCID": "2", "SLURM_STEP_ID": "0", "SLURM_STEP_NODELIST": "n[1-2]",
    "SLURM_STEP_NUM_NODES": "2", "SLURM_STEP_NUM_TASKS": "4", "SLURM_STEP_TASKS_PER_NODE": "2(x2)",
}  # fmt: skip


def test_a_process_without_any_variables_is_alone():
    assert join_arguments({"TPU_SKIP_MDS_QUERY": "1"}) is None
    assert join_arguments({"JAX_PLATFORMS": "cpu", "TPU_WORKER_HOSTNAMES": "a,b"}) is None


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "[::1]"])
def test_a_coordinator_on_this_machine_is_not_on_the_network(host: str):
    joining = join_arguments(EXPLICIT | {"ZIGGURAT_COORDINATOR": f"{host}:8476"})
    assert joining is not None
    assert joining["coordinator_bind_address"] == joining["coordinator_address"] == f"{host}:8476"
    one_node = STEP | {"SLURM_NODEID": "0", "SLURM_STEP_TASKS_PER_NODE": "4", "SLURM_JOB_ID": "4097"}
    joining = join_arguments(one_node)
    assert joining is not None
    assert joining["coordinator_bind_address"] == joining["coordinator_address"] == "127.0.0.1:61441"


def test_a_port_that_is_taken_is_a_fault_of_one_line():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(Fault, match=f"port {port} of the coordinator cannot be opened: .*; start again"):
            check_port(f"127.0.0.1:{port}", port)
    check_port("127.0.0.1:0", 0)


@given(
    st.sampled_from([name for name in STEP if name not in ("SLURM_NODELIST", "SLURM_NTASKS", "SLURM_TASKS_PER_NODE")]),
    st.one_of(st.text(max_size=4), st.sampled_from(["²", "9" * 5000, "7", "-1", "2(x", "(x3)", "1,,2", "2(x9999999)"])),
)
def test_a_malformed_variable_of_slurm_is_the_users_error(name: str, value: str):
    with suppress(InputError):
        join_arguments(STEP | {name: value, "SLURM_GPUS_ON_NODE": value, "CUDA_VISIBLE_DEVICES": "0,1"})


def test_variables_of_the_launcher_come_first():
    joining = join_arguments(STEP | EXPLICIT)
    assert joining == {
        "coordinator_address": "node1:8476", "num_processes": 4, "process_id": 3,
        "cluster_detection_method": "deactivate",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"ZIGGURAT_PROCESS_ID": ""}, "ZIGGURAT_PROCESS_ID: not set, but ZIGGURAT_COORDINATOR, ZIGGURAT_NUM_PROCESSES"),
        ({"ZIGGURAT_PROCESS_ID": "-1"}, "ZIGGURAT_PROCESS_ID=-1 must be a whole number"),
        ({"ZIGGURAT_PROCESS_ID": "4"}, "ZIGGURAT_PROCESS_ID=4 must be less than ZIGGURAT_NUM_PROCESSES=4"),
        ({"ZIGGURAT_NUM_PROCESSES": "two"}, "ZIGGURAT_NUM_PROCESSES=two must be a whole number"),
        ({"ZIGGURAT_COORDINATOR": "node1"}, "ZIGGURAT_COORDINATOR=node1 must be the host and port of process 0"),
    ],
)
def test_a_wrong_variable_is_named(wrong: dict, words: str):
    with pytest.raises(InputError, match=words):
        explicit_join(EXPLICIT | wrong)


def test_only_a_task_of_a_step_with_more_than_one_waits_for_others():
    assert join_arguments(BATCH) is None
    # A shell in an allocation (salloc), or `srun --pty bash`.
    assert join_arguments(BATCH | {"SLURM_STEP_NUM_TASKS": "1", "SLURM_STEP_TASKS_PER_NODE": "1"}) is None
    assert join_arguments(STEP) == {
        "num_processes": 4, "process_id": 2, "local_device_ids": [], "cluster_detection_method": "slurm",
    }  # fmt: skip
    for name in ("SLURM_PROCID", "SLURM_STEP_NODELIST"):
        with pytest.raises(InputError, match=f"{name}: not set, but SLURM_STEP_NUM_TASKS"):
            join_arguments({key: value for key, value in STEP.items() if key != name})
    with pytest.raises(InputError, match="SLURM_STEP_NUM_TASKS=many must be a whole number"):
        join_arguments(STEP | {"SLURM_STEP_NUM_TASKS": "many"})


def test_slurms_short_form_is_understood():
    assert tasks_on_nodes("2(x3),1") == [2, 2, 2, 1]
    assert tasks_on_nodes("8") == [8]


def test_tasks_of_a_node_share_its_gpus_and_one_alone_has_them_all():
    shown = {"CUDA_VISIBLE_DEVICES": "0,1,2,3", "SLURM_GPUS_ON_NODE": "4"}

    def devices(of: dict, local: int = 0) -> list[int]:
        joining = join_arguments(STEP | of | {"SLURM_LOCALID": str(local)})
        assert joining is not None
        return joining["local_device_ids"]

    one_a_node = {"SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_TASKS_PER_NODE": "1(x2)", "SLURM_PROCID": "1"}
    assert devices(shown | one_a_node) == []
    assert [devices(shown, i) for i in (0, 1)] == [[0, 1], [2, 3]]
    # With --gpus-per-task each task is shown its own, by numbers that begin at 0 or not.
    assert devices({"CUDA_VISIBLE_DEVICES": "2,3", "SLURM_GPUS_ON_NODE": "4"}, 1) == []
    assert devices({"CUDA_VISIBLE_DEVICES": "0", "SLURM_GPUS_ON_NODE": "2"}, 1) == []
    with pytest.raises(InputError, match="2 processes cannot share the 3 GPUs of a machine evenly"):
        devices({"CUDA_VISIBLE_DEVICES": "0,1,2"})
    assert share_of_gpus({"CUDA_VISIBLE_DEVICES": "0,1,2", "JAX_PLATFORMS": "cpu"}, 0, 2) is None
    assert share_of_gpus({"CUDA_VISIBLE_DEVICES": ""}, 0, 2) is None
    assert share_of_gpus({"CUDA_VISIBLE_DEVICES": "GPU-8a,GPU-9b"}, 1, 2) == [1]


@pytest.mark.parametrize(
    ("answers", "pod"),
    [
        ({"worker-network-endpoints": "10.0.0.2,10.0.0.3"}, True),
        ({"worker-network-endpoints": "unknown:unknown:10.0.0.2"}, False),
        ({"worker-network-endpoints": "10.0.0.2", "tpu-env": "ZONE: 'a'\nMEGASCALE_NUM_SLICES: '2'\n"}, True),
        ({}, False),
    ],
    ids=["two hosts", "one host", "two slices of one host", "no TPU machine"],
)
def test_a_tpu_machine_waits_for_others_only_where_there_are_any(answers: dict, pod: bool):
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            text = answers.get(self.path.rpartition("/")[2])
            self.send_response(404 if text is None else 200)
            self.end_headers()
            self.wfile.write((text or "not found").encode())

        def log_message(self, *_):
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        environment = {"GCE_METADATA_IP": f"127.0.0.1:{server.server_port}"}
        assert is_tpu_pod(environment) is pod
        assert is_tpu_pod(environment | {"TPU_SKIP_MDS_QUERY": "1"}) is False
    finally:
        server.shutdown()
        server.server_close()
    assert is_tpu_pod(environment) is False  # nobody answers


def test_googles_kubernetes_names_the_hosts_in_variables():
    assert is_tpu_pod({"TPU_WORKER_HOSTNAMES": "a-0.a,a-1.a"}) is True
    assert is_tpu_pod({"TPU_WORKER_HOSTNAMES": "localhost"}) is False
    assert is_tpu_pod({"TPU_WORKER_HOSTNAMES": "localhost", "MEGASCALE_NUM_SLICES": "2"}) is True
