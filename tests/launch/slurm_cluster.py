"""A real Slurm on this machine: munge, slurmctld and two slurmd, all in one folder, ended with the test."""

import os
import pwd
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import pytest

from launch.local import free_port

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "scancel")
# JAX connects to the name of a job's first node; these need no name service.
NODES = ("127.0.0.1", "127.0.0.2")
CONF = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmctldPidFile={folder}/slurmctld.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdSpoolDir={folder}/%n
SlurmdPidFile={folder}/%n.pid
SlurmdLogFile={folder}/%n.log
SlurmdParameters=config_overrides
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
MpiDefault=none
ReturnToService=2
SlurmdTimeout=20
KillWait=5
SchedulerParameters=sched_interval=5
{nodes}
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


def require_slurm() -> None:
    """Skips the test where Slurm is not installed; fails it with ZIGGURAT_REQUIRE_PEERS=1."""
    missing = [name for name in PROGRAMS if shutil.which(name, path=search_path()) is None]
    if missing and os.environ.get("ZIGGURAT_REQUIRE_PEERS") == "1":
        pytest.fail(f"{', '.join(missing)}: not installed, and ZIGGURAT_REQUIRE_PEERS=1")
    if missing:
        pytest.skip(f"{', '.join(missing)}: not installed; Debian: apt-get install slurm-wlm slurm-wlm-plugins munge")


def search_path() -> str:
    """The path of a daemon, which may not be on a user's PATH."""
    return f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"


class Slurm:
    """The cluster while it runs.

    Attributes:
        environment: of the commands that talk to it.
        folder: of its logs and its state.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.environment: Mapping[str, str] = os.environ | {
            "SLURM_CONF": str(folder / "slurm.conf"),
            "PATH": search_path(),
            # Else it follows from the job's number, and clusters of several tests would meet there.
            "JAX_COORDINATOR_PORT": str(free_port()),
        }
        self._daemons: dict[str, subprocess.Popen] = {}

    def start(self, name: str, *command: str) -> None:
        """Start a daemon in the foreground of a session of its own."""
        with open(self.folder / f"{name}.out", "a") as out:
            self._daemons[name] = subprocess.Popen(
                command, env=self.environment, stdout=out, stderr=out, stdin=subprocess.DEVNULL, start_new_session=True
            )

    def start_node(self, node: str) -> None:
        """Start the slurmd of a node."""
        self.start(node, "slurmd", "-D", "-N", node)

    def kill_node(self, node: str) -> None:
        """Kills a node's slurmd and all that runs there at once, as a loss of power does."""
        self._daemons.pop(node).kill()
        for pid in self.processes(f"SLURMD_NODENAME={node}"):
            os.kill(pid, signal.SIGKILL)

    def processes(self, setting: str) -> list[int]:
        """Processes of this cluster's jobs, and their managers, whose environment has a setting."""
        found = []
        wanted = {setting.encode(), f"SLURM_CONF={self.folder}/slurm.conf".encode()}
        for entry in Path("/proc").iterdir():
            try:
                if entry.name.isdigit() and wanted <= set((entry / "environ").read_bytes().split(b"\0")):
                    found.append(int(entry.name))
            except OSError:  # it has ended, or is another user's
                continue
        return found

    def run(self, *command: object) -> str:
        """Standard output of one of Slurm's commands."""
        done = subprocess.run([*map(str, command)], env=self.environment, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, (command, done.stderr)
        return done.stdout

    def job(self, job: str) -> dict[str, str]:
        """The output of `scontrol show job`."""
        words = self.run("scontrol", "--oneliner", "show", "job", job).split()
        return {name: value for name, _, value in (word.partition("=") for word in words)}

    def wait(self, condition, seconds: float, what: str) -> None:
        """Waits until a condition holds; raises AssertionError with the cluster's logs where it does not in time."""
        deadline = time.monotonic() + seconds
        while not condition():
            logs = [path for path in sorted(self.folder.glob("*.log")) if time.monotonic() > deadline]
            assert time.monotonic() < deadline, "\n".join([what, *(path.read_text()[-3000:] for path in logs)])
            time.sleep(0.2)

    def stop(self) -> None:
        """Ends everything that still runs."""
        for pid in self.processes(f"SLURM_CONF={self.folder}/slurm.conf"):
            if pid not in [daemon.pid for daemon in self._daemons.values()]:
                os.kill(pid, signal.SIGKILL)
        for daemon in self._daemons.values():
            daemon.kill()
            daemon.wait()


@contextmanager
def slurm_cluster() -> Iterator[Slurm]:
    """Two nodes of four CPUs, until the end of the context."""
    with tempfile.TemporaryDirectory(prefix="slurm-") as name:  # a short path: a socket's must be
        slurm = Slurm(Path(name))
        try:
            configure_and_start(slurm, Path(name))
            yield slurm
        finally:
            slurm.stop()


def configure_and_start(slurm: Slurm, folder: Path) -> None:
    """Waits until both nodes can run a job."""
    for name in ("state", *NODES):
        (folder / name).mkdir(parents=True)
    (folder / "key").write_bytes(os.urandom(1024))
    (folder / "key").chmod(0o600)
    nodes = "\n".join(f"NodeName={node} NodeAddr=127.0.0.1 Port={free_port()} CPUs=4 RealMemory=4000" for node in NODES)
    host = socket.gethostname().partition(".")[0]
    user = pwd.getpwuid(os.getuid()).pw_name
    text = CONF.format(host=host, port=free_port(), user=user, folder=folder, nodes=nodes)
    (folder / "slurm.conf").write_text(text)
    slurm.start("munged", "munged", "--foreground", "--force", f"--socket={folder}/munge.socket",
                f"--key-file={folder}/key", f"--pid-file={folder}/munged.pid", f"--seed-file={folder}/seed",
                f"--log-file={folder}/munged.log")  # fmt: skip
    slurm.wait((folder / "munge.socket").exists, 10, "munge does not start")
    slurm.start("slurmctld", "slurmctld", "-D")
    for node in NODES:
        slurm.start_node(node)
    slurm.wait(lambda: idle_nodes(slurm) == set(NODES), 30, "the nodes do not come up")


def idle_nodes(slurm: Slurm) -> set[str]:
    """The nodes that can run a job."""
    done = subprocess.run(["sinfo", "--noheader", "--Node", "--format=%N %T"], env=slurm.environment,
                          capture_output=True, text=True)  # fmt: skip
    return {line.split()[0] for line in done.stdout.splitlines() if line.endswith(" idle")}
