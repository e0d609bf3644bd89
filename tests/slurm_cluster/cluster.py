"""A real Slurm of four nodes on this machine: slurmctld and four slurmd, with munge, in their own folder.

Runs as root or as a plain user, and beside other such clusters: each holds a block of ports, an own loopback
network and an own range of job ids (the ranks' meeting port follows from the job id). As root each slurmd has
a private hostname and hosts file, so that node names resolve inside jobs as on a real cluster; a plain user's
nodes are named by their addresses instead. What is in slurm.conf was found on Slurm 22.05.8 and says why.
"""

import contextlib
import getpass
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "squeue", "scancel", "unshare")
_SEARCH = os.pathsep.join((os.environ.get("PATH", ""), "/usr/sbin", "/sbin", "/usr/local/sbin"))
_FIRST_PORT, _PORTS, _CLUSTERS = 30_000, 10, 250  # below the ports that Linux gives out (32768 and up)
_NODES = 4
_PREFIX = "motley-slurm"
START_TIMEOUT_S = 60.0


def missing_programs() -> list[str]:
    """What of Slurm this machine lacks; [] if a cluster can be started."""
    return [name for name in PROGRAMS if shutil.which(name, path=_SEARCH) is None]


class Cluster:
    """A running cluster. `environment` leads Slurm's commands to it."""

    def __init__(self, root: Path, number: int, *, namespaces: bool) -> None:
        self.root, self.number, self.namespaces = root, number, namespaces
        self.conf = root / "etc" / "slurm.conf"
        network = f"127.{77 + number // 200}.{1 + number % 200}"
        self.addresses = [f"{network}.{k}" for k in range(1, _NODES + 1)]
        self.nodes = [f"node{k}" for k in range(1, _NODES + 1)] if namespaces else self.addresses
        self._node_list = f"node[1-{_NODES}]" if namespaces else f"{network}.[1-{_NODES}]"
        self._address_list = f"{network}.[1-{_NODES}]"
        self.small: Path | None = None
        """A folder of 8 MiB that all nodes see; None where one may not mount."""
        self.environment = {"PATH": _SEARCH, "SLURM_CONF": str(self.conf), "LC_ALL": "C.UTF-8"}

    @property
    def controller_log(self) -> Path:
        return self.root / "log" / "slurmctld.log"

    def run(self, *command: str, check: bool = True) -> str:
        """Output of one of Slurm's commands, as a user of the cluster would type it."""
        done = subprocess.run(
            command, env=dict(os.environ) | self.environment, capture_output=True, text=True, timeout=60
        )
        assert not check or done.returncode == 0, f"{' '.join(command)}: {done.stdout}{done.stderr}"
        return done.stdout + done.stderr

    def job(self, job_id: int) -> dict[str, str]:
        """What `scontrol show job` says; {} where the controller is too busy to answer."""
        text = self.run("scontrol", "-o", "show", "job", str(job_id), check=False)
        return dict(item.split("=", 1) for item in text.split() if "=" in item)

    def wait_for(
        self, job_id: int, condition: Callable[[dict[str, str]], bool], timeout_s: float
    ) -> dict[str, str]:
        """Look at a job until `condition` holds; returns what was seen."""
        deadline = time.monotonic() + timeout_s
        while not (job := self.job(job_id)) or not condition(job):
            assert time.monotonic() < deadline, f"job {job_id} after {timeout_s} s: {job}"
            time.sleep(0.2)
        return job

    def start(self) -> None:
        """Start all daemons; returns when every node is idle."""
        for folder in ("etc", "run/munge", "log", "state", *(f"spool/{node}" for node in self.nodes)):
            (self.root / folder).mkdir(parents=True, exist_ok=True)
        self._write_settings()
        small = self.root / "small"
        small.mkdir(exist_ok=True)
        mount = ("mount", "-t", "tmpfs", "-o", "size=8m,mode=1777", "tmpfs", str(small))
        if self.namespaces and subprocess.run(mount, capture_output=True).returncode == 0:
            self.small = small  # made before the nodes, which have mounts of their own from then on
        run = self.root / "run" / "munge"
        self._daemon(
            "munged",
            f"--key-file={self.root / 'etc' / 'munge.key'}",
            *(f"--{name}={run / name}" for name in ("socket", "pid-file", "seed-file")),
            f"--log-file={self.root / 'log' / 'munged.log'}",
            "--num-threads=2",
            *(["--force"] if os.getuid() == 0 else []),  # its folder belongs to root, not to user munge
        )
        self.start_controller()
        for node in self.nodes:
            self._daemon("slurmd", "-f", str(self.conf), "-N", node, node=node)
        deadline = time.monotonic() + START_TIMEOUT_S
        states = ("sinfo", "-h", "-N", "-p", "debug", "-o", "%T")
        while self.run(*states, check=False).split() != ["idle"] * _NODES:
            assert time.monotonic() < deadline, f"no four idle nodes; logs: {self.root / 'log'}"
            time.sleep(0.1)

    def start_controller(self) -> None:
        self._daemon("slurmctld", "-f", str(self.conf), node="controller")

    def stop_controller(self) -> None:
        """As at an update of Slurm: what it knows is kept for the next."""
        pid = int((self.root / "run" / "slurmctld.pid").read_text())
        os.kill(pid, signal.SIGTERM)
        deadline = time.monotonic() + START_TIMEOUT_S
        while pid in self.processes():
            assert time.monotonic() < deadline, f"slurmctld does not end: {self.controller_log}"
            time.sleep(0.05)

    def reboot(self, node: str) -> None:
        """A node that loses power and comes back: its daemon, its tasks and who watched them are gone."""
        daemon = int((self.root / "run" / f"slurmd.{node}.pid").read_text())
        ours = f"SLURMD_NODENAME={node}".encode()
        victims = [daemon]
        for pid in self.processes():
            with contextlib.suppress(OSError):
                folder = Path("/proc", str(pid))
                if ours in (folder / "environ").read_bytes().split(b"\0"):
                    parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
                    watches = b"slurmstepd" in Path("/proc", str(parent), "cmdline").read_bytes()
                    victims += [parent, pid] if watches else [pid]
        for pid in dict.fromkeys(victims):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self._daemon("slurmd", "-f", str(self.conf), "-N", node, "-b", node=node)

    def stop(self) -> None:
        """End every process of the cluster: the daemons, and what jobs left behind.

        slurmd does not take its jobs down with it: they are found by the SLURM_CONF in their environment.
        """
        with contextlib.suppress(AssertionError, subprocess.TimeoutExpired):
            self.run("scancel", "--signal=KILL", "--user", getpass.getuser(), check=False)
        for number, patience_s in ((signal.SIGTERM, 5.0), (signal.SIGKILL, 5.0)):
            deadline = time.monotonic() + patience_s
            for pid in (found := self.processes()):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, number)
            while found and time.monotonic() < deadline:
                time.sleep(0.05)
                found = self.processes()
        assert not (left := self.processes()), f"processes of the cluster live on: {left}"
        if os.path.ismount(self.root / "small"):
            subprocess.run(("umount", "--lazy", str(self.root / "small")), check=True)

    def processes(self) -> list[int]:
        """All processes that belong to this cluster, by their environment; zombies do not count."""
        ours = f"SLURM_CONF={self.conf}".encode()
        found = []
        for folder in Path("/proc").iterdir():
            if folder.name.isdigit() and int(folder.name) != os.getpid():
                with contextlib.suppress(OSError):
                    alive = (folder / "stat").read_text().rpartition(")")[2].split()[0] != "Z"
                    if alive and ours in (folder / "environ").read_bytes().split(b"\0"):
                        found.append(int(folder.name))
        return found

    def _daemon(self, program: str, *arguments: str, node: str | None = None) -> None:
        path = shutil.which(program, path=_SEARCH)
        assert path is not None, program
        command = [path, *arguments]
        if node is not None and self.namespaces:
            enter = 'hostname "$0" && mount --bind "$1" /etc/hosts && shift && exec "$@"'
            hosts = str(self.root / "etc" / "hosts")
            command = ["unshare", "-mu", "--propagation", "private", "sh", "-c", enter, node, hosts, *command]
        done = subprocess.run(
            command,
            env=dict(os.environ) | self.environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert done.returncode == 0, f"{program}: {done.stderr}; logs: {self.root / 'log'}"

    def _write_settings(self) -> None:
        etc = self.root / "etc"
        key = etc / "munge.key"
        key.touch(mode=0o600)
        key.write_bytes(os.urandom(1024))
        names = ["127.0.0.1 localhost controller"]
        names += [f"{address} {node}" for address, node in zip(self.addresses, self.nodes, strict=True)]
        (etc / "hosts").write_text("\n".join(names) + "\n")
        self.conf.write_text(self._slurm_conf())

    def _slurm_conf(self) -> str:
        port = _FIRST_PORT + _PORTS * self.number
        user, root = getpass.getuser(), self.root
        return f"""\
ClusterName=motley{self.number}
SlurmctldHost=localhost(127.0.0.1)
SlurmctldPort={port + 1}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
CredType=cred/munge
# a requeued job waits cred_expire and a second or two; less than 5 is ignored and 120 taken
AuthInfo=socket={root}/run/munge/socket,cred_expire=5
StateSaveLocation={root}/state
SlurmdSpoolDir={root}/spool/%n
SlurmctldPidFile={root}/run/slurmctld.pid
SlurmdPidFile={root}/run/slurmd.%n.pid
SlurmctldLogFile={self.controller_log}
SlurmdLogFile={root}/log/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
PropagateResourceLimits=NONE
# more CPUs than the machine has
SlurmdParameters=config_overrides
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
DefMemPerCPU=100
ReturnToService=1
TreeWidth=65533
# a node that is only starved of its share of two cores is not taken for lost
SlurmdTimeout=90
SlurmctldTimeout=5
MessageTimeout=30
TCPTimeout=1
KillWait=30
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=2,sched_min_interval=0,bf_interval=2,batch_sched_delay=0
JobRequeue=1
MinJobAge=3600
# the ranks' meeting port is 15000 + job id % 15000: other clusters on this machine use other ids
FirstJobId={1 + self.number * (15_000 // _CLUSTERS)}
JobAcctGatherType=jobacct_gather/linux
JobCompType=jobcomp/none
AccountingStorageType=accounting_storage/none
NodeName={self._node_list} NodeHostname={socket.gethostname()} NodeAddr={self._address_list} \
Port=[{port + 2}-{port + 1 + _NODES}] CPUs=8 RealMemory=16000
# jobs of `low` make room for those of `high`, and of `low_grace` with a warning
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
PartitionName=debug Nodes=ALL Default=YES MaxTime=INFINITE State=UP PriorityTier=100 PreemptMode=OFF
PartitionName=low Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=1
PartitionName=low_grace Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=1 GraceTime=120
PartitionName=high Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=100 PreemptMode=OFF
"""


@contextlib.contextmanager
def running_cluster(*, namespaces: bool | None = None) -> Iterator[Cluster]:
    """A cluster for the time of a with block. `namespaces` None: private ones if this user may make them."""
    end_orphans()
    with _number() as number:
        # A short path: a munge socket's may have 107 characters. Passable: jobs may be another user's.
        root = Path(tempfile.mkdtemp(prefix=f"{_PREFIX}{number}-", dir="/tmp"))
        root.chmod(0o755)
        if namespaces is None:
            namespaces = _may_make_namespaces()
        cluster = Cluster(root, number, namespaces=namespaces)
        try:
            cluster.start()
            yield cluster
        except BaseException:
            print(f"the cluster's logs are kept: {root / 'log'}", file=sys.stderr)
            cluster.stop()
            raise
        cluster.stop()
        shutil.rmtree(root, ignore_errors=True)


@contextlib.contextmanager
def _number() -> Iterator[int]:
    """A number that no other cluster here has, of whatever user: the first of its ports is held."""
    first = os.getpid() % _CLUSTERS
    for number in (*range(first, _CLUSTERS), *range(first)):
        if guard := _guard(number):
            with contextlib.closing(guard):
                yield number
            return
    raise RuntimeError(f"all {_CLUSTERS} blocks of ports are taken")


def _guard(number: int) -> socket.socket | None:
    """The port that says that a cluster of this number has a living owner; None if it has."""
    guard = socket.socket()
    guard.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        guard.bind(("127.0.0.1", _FIRST_PORT + _PORTS * number))
        guard.listen(1)
    except OSError:
        guard.close()
        return None
    return guard


def end_orphans() -> None:
    """Stop clusters of this user whose owner was killed: their daemons go on without it."""
    for root in Path("/tmp").glob(f"{_PREFIX}*-*"):
        number = int(root.name.removeprefix(_PREFIX).partition("-")[0])
        if root.stat().st_uid == os.getuid() and (guard := _guard(number)):
            with contextlib.closing(guard):
                Cluster(root, number, namespaces=False).stop()
                shutil.rmtree(root, ignore_errors=True)


def _may_make_namespaces() -> bool:
    mount = "mount --bind /etc/hosts /etc/hosts"
    done = subprocess.run(
        ["unshare", "-mu", "--propagation", "private", "sh", "-c", mount], capture_output=True
    )
    return done.returncode == 0


def environment_of(cluster: Cluster, base: Mapping[str, str]) -> dict[str, str]:
    """`base` for a process that is to use the cluster, with one thread and no accelerator for ranks."""
    own = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}
    return dict(base) | cluster.environment | own
