"""A real Slurm on this machine: a controller, several node daemons, munge of its own.

Everything lies in one folder and listens on ports of its own; what is stopped is stopped by the
process that was started. Slurm's programs come from Debian's packages munge, slurmctld, slurmd and
slurm-client.
"""

import contextlib
import getpass
import os
import random
import secrets
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "squeue")
PLACES = "/usr/sbin:/usr/bin:/sbin:/bin:/usr/local/sbin:/usr/local/bin"

CONFIGURATION = """\
ClusterName=lab
SlurmctldHost={host}(127.0.0.1)
SlurmUser={user}
SlurmdUser={user}
SlurmctldPort={port}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
CredType=cred/munge
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=1,bf_interval=1,batch_sched_delay=0
SlurmdParameters=config_overrides
SwitchType=switch/none
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ReturnToService=2
SlurmdTimeout=10
InactiveLimit=0
MinJobAge=300
KillWait=8
JobRequeue=1
EnforcePartLimits=NO
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
{more}
PartitionName=DEFAULT Nodes=ALL MaxTime=24:00:00 State=UP PreemptMode=off
PartitionName=main Default=YES PriorityTier=10
PartitionName=low PriorityTier=1 GraceTime=12 PreemptMode=REQUEUE
PartitionName=high PriorityTier=100
"""


def missing() -> str | None:
    """Say why there can be no Slurm here, or None."""
    absent = [name for name in PROGRAMS if shutil.which(name, path=PLACES) is None]
    if absent:
        return f"Slurm is not installed (no {', '.join(absent)})"
    if os.geteuid() != 0:
        return "Slurm's node daemons are started as root only"
    return None


@dataclass
class Lab:
    """One cluster.

    Args:
        folder: everything lies there.
        nodes: node daemons, called node1, node2, ...
        cpus: that each node claims to have.
        gpus: files that each node shows as GPUs.
        signals_on_preemption: whether preempted jobs also get their warning signal.
    """

    folder: Path
    nodes: int = 2
    cpus: int = 4
    gpus: int = 0
    signals_on_preemption: bool = False
    _munge: subprocess.Popen[bytes] | None = field(default=None, init=False)

    @property
    def environment(self) -> dict[str, str]:
        """The environment in which Slurm's commands find this cluster."""
        path = f"{os.environ['PATH']}:{PLACES}"
        return {**os.environ, "SLURM_CONF": str(self.folder / "slurm.conf"), "PATH": path}

    def up(self) -> None:
        """Start it, and wait until all nodes are idle."""
        (self.folder / "state").mkdir(parents=True)
        key = self.folder / "munge.key"
        key.touch(mode=0o400)
        key.write_bytes(secrets.token_bytes(1024))
        self._write_configuration()
        self.start_munge()
        self.start_controller()
        for number in range(1, self.nodes + 1):
            self.start_node(f"node{number}")
        self._wait(
            lambda: (
                self.slurm("sinfo", "-h", "-N", "-p", "main", "-o", "%T").split()
                == ["idle"] * self.nodes
            ),
            30,
        )

    def down(self) -> None:
        """Stop everything that was started, jobs included."""
        with contextlib.suppress(subprocess.SubprocessError):
            self.slurm("scancel", "--full", "--signal=KILL", "--user", getpass.getuser())
            self.slurm("scancel", "--user", getpass.getuser())
            self._wait(lambda: not self.slurm("squeue", "-h"), 30)
        for number in range(1, self.nodes + 1):
            self._kill(f"slurmd-node{number}.pid", signal.SIGTERM)
        self._kill("slurmctld.pid", signal.SIGTERM)
        self.stop_munge()

    def start_munge(self) -> None:
        """Start the daemon that all others sign their messages with."""
        words = ["munged", "--force", "--foreground", f"--key-file={self.folder}/munge.key"]
        words += [
            f"--{name}={self.folder}/munge.{name.partition('-')[0]}"
            for name in ("socket", "pid-file", "log-file", "seed-file")
        ]
        self._munge = subprocess.Popen(  # noqa: S603 - made here
            words, env=self.environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        self._wait((self.folder / "munge.socket").exists, 10)

    def stop_munge(self) -> None:
        """Stop it."""
        if self._munge is not None:
            self._munge.terminate()
            self._munge.wait(10)

    def slurm(self, *words: str) -> str:
        """Run one of Slurm's commands and return what it printed."""
        return subprocess.run(  # noqa: S603 - made here
            words, env=self.environment, capture_output=True, text=True, timeout=60, check=True
        ).stdout

    def job(self, number: str) -> Mapping[str, str]:
        """Return what Slurm knows of a job, by its names."""
        text = self.slurm("scontrol", "--oneliner", "show", "job", number)
        return dict(word.split("=", 1) for word in text.split() if "=" in word)

    def start_controller(self) -> None:
        """Start the controller."""
        self.slurm("slurmctld")

    def kill_controller(self) -> None:
        """Kill the controller, as if its machine had lost power."""
        self._kill("slurmctld.pid", signal.SIGKILL)

    def start_node(self, name: str) -> None:
        """Start a node's daemon."""
        self.slurm("slurmd", "-N", name)

    def kill_node(self, name: str, *, ranks_too: bool) -> list[int]:
        """Kill a node's daemon and its steps; return the processes of jobs that are left alive."""
        tasks = list(self.processes(name))
        parents = {_parent(pid) for pid in tasks}
        daemons = {pid for pid in parents if _name(pid).startswith("slurmstepd")}
        self._kill(f"slurmd-{name}.pid", signal.SIGKILL)
        for pid in [*daemons, *(tasks if ranks_too else [])]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        return [] if ranks_too else tasks

    def processes(self, node: str) -> Iterator[int]:
        """Find the processes that jobs run on a node."""
        wanted = {
            f"SLURMD_NODENAME={node}".encode(),
            f"SLURM_CONF={self.folder}/slurm.conf".encode(),
        }
        for entry in Path("/proc").iterdir():
            if entry.name.isdecimal():
                with contextlib.suppress(OSError):
                    if wanted <= set((entry / "environ").read_bytes().split(b"\0")):
                        yield int(entry.name)

    def _write_configuration(self) -> None:
        host, port = socket.gethostname().partition(".")[0], _free_ports(1 + self.nodes)
        more = []
        if self.signals_on_preemption:
            more.append("SlurmctldParameters=preempt_send_user_signal")
        resources = ""
        if self.gpus:
            more.append("GresTypes=gpu")
            resources = f" Gres=gpu:{self.gpus}"
            for number in range(self.gpus):
                # Slurm wants a device; not every container may make one.
                (self.folder / f"gpu{number}").symlink_to("/dev/null")
            names = f"gpu[0-{self.gpus - 1}]" if self.gpus > 1 else "gpu0"
            (self.folder / "gres.conf").write_text(f"Name=gpu File={self.folder}/{names}\n")
        more += [
            f"NodeName=node{number} NodeHostname={host} NodeAddr=127.0.0.1 "
            f"Port={port + number} CPUs={self.cpus} RealMemory=4000{resources} State=UNKNOWN"
            for number in range(1, self.nodes + 1)
        ]
        text = CONFIGURATION.format(
            host=host, user=getpass.getuser(), port=port, folder=self.folder, more="\n".join(more)
        )
        (self.folder / "slurm.conf").write_text(text)

    def _kill(self, pid_file: str, number: signal.Signals) -> None:
        path = self.folder / pid_file
        if not path.exists() or not path.read_text().strip():
            return
        pid = int(path.read_text())
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)
        self._wait(lambda: not _is_alive(pid), 20)
        path.unlink(missing_ok=True)

    def _wait(self, condition: Callable[[], object], seconds: float) -> None:
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            with contextlib.suppress(subprocess.SubprocessError):
                if condition():
                    return
            time.sleep(0.1)
        raise TimeoutError(f"Slurm did not come to order; its logs are in {self.folder}")


@contextlib.contextmanager
def lab(folder: Path, **facts: int) -> Iterator[Lab]:
    """Run a cluster for the length of a block."""
    made = Lab(folder, **facts)  # type: ignore[arg-type]
    try:
        made.up()
        yield made
    finally:
        made.down()


def _parent(pid: int) -> int:
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return 0
    return int(text.rpartition(")")[2].split()[1])


def _name(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/comm").read_text()
    except OSError:
        return ""


def _is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def _free_ports(count: int) -> int:
    """Find a row of free ports, below those that the system hands out by itself."""
    for first in random.sample(range(17_000, 31_000, count), 100):
        with contextlib.ExitStack() as stack:
            try:
                for port in range(first, first + count):
                    stack.enter_context(socket.create_server(("127.0.0.1", port)))
            except OSError:
                continue
            return first
    raise RuntimeError("no free ports")
