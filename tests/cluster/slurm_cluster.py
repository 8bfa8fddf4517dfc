"""Slurm for real: a controller and nodes, on hosts of their own or all on this machine, with jobs and their output."""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from tests.cluster.hosts import SYSTEM_PATH, Hosts, find, hosts, require
from tests.distributed import REPOSITORY, environment, free_port

PROGRAMS = ("slurmctld", "slurmd", "munged", "srun", "sbatch", "salloc", "scancel", "scontrol", "sinfo", "squeue")
GPUS = 4
"""Empty files, of each node."""
START, END = 240, 180
"""Seconds within which a job must say something, and end."""
CONFIGURATION = """
ClusterName=test
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
SlurmdParameters=config_overrides
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerParameters=sched_interval=2,bf_interval=2,batch_sched_delay=0
SlurmdTimeout={timeout}
ReturnToService=2
KillWait=30
JobRequeue=1
GresTypes=gpu
MpiDefault=none
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""
Starter = Callable[..., "subprocess.Popen[Any]"]


class Slurm:
    """A cluster that runs.

    Args:
        folder: for its files.
        start: a command on one of its machines, as of `Hosts.start`.
        controller: name of the machine of slurmctld.
    """

    def __init__(self, folder: Path, start: Starter, controller: str) -> None:
        self.folder = folder
        self._start, self._controller = start, controller

    def start(self, command: Sequence[object], env: dict[str, str] | None = None, **options: Any) -> Any:
        """Start a command that talks to the controller, on its machine."""
        known = {"SLURM_CONF": str(self.folder / "slurm.conf"), "SLURM_TIME_FORMAT": "%s"}
        return self._start(self._controller, command, env=known | (env or {}), **options)

    def run(self, *command: object, env: dict[str, str] | None = None, code: int = 0, timeout: float = END) -> str:
        """Run a command of Slurm, which must end with an exit code. Returns what it printed."""
        process = self.start(command, env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        try:
            output, _ = process.communicate(timeout=timeout)
        finally:
            process.kill()
        assert process.returncode == code, f"{process.returncode}: {output[-6000:]}"
        return output

    def submit(self, *arguments: object, env: dict[str, str] | None = None) -> Job:
        """Start `sbatch` with options, a script and its arguments."""
        output = self.folder / "job-%A-%a.log"
        words = ["sbatch", "--parsable", "--output", output, *arguments]
        return Job(self, self.run(*words, env=env).strip())

    def cancel(self) -> None:
        """End all jobs, at once."""
        self.run("scancel", "--signal=KILL", "--full", "--user=root")
        self.run("scancel", "--user=root")
        until = time.monotonic() + 15
        while self.run("squeue", "--noheader") and time.monotonic() < until:
            time.sleep(0.2)

    def facts(self, job: object) -> dict[str, str]:
        """What Slurm knows of a job."""
        shown = self.run("scontrol", "show", "--oneliner", "job", job)
        return dict(re.findall(r"(\w[\w:/]*)=(\S*)", shown))


class Job:
    """Of `sbatch`.

    Attributes:
        number: of it, or `12_3` of a task of an array.
    """

    def __init__(self, slurm: Slurm, number: str) -> None:
        self.number = number
        self._slurm = slurm

    @property
    def output(self) -> str:
        """Of all its starts; of an array, those of all tasks."""
        name = self.number.replace("_", "-") if "_" in self.number else f"{self.number}-*"
        return "".join(path.read_text() for path in sorted(self._slurm.folder.glob(f"job-{name}.log")))

    @property
    def state(self) -> str:
        return self._slurm.facts(self.number)["JobState"]

    @property
    def node(self) -> str:
        """Of its script."""
        return self._slurm.facts(self.number)["BatchHost"]

    def is_over(self) -> bool:
        return self.state not in ("PENDING", "CONFIGURING", "RUNNING", "COMPLETING", "REQUEUED", "SUSPENDED")

    def says(self, pattern: str, times: int = 1) -> None:
        """Wait until its output matches a regular expression so often."""
        self.wait(lambda: len(re.findall(pattern, self.output)) >= times, START, f"say {pattern}")

    def ends(self, state: str, seconds: float = END) -> str:
        """Wait until it is over, for good, in a state of Slurm. Returns its output."""
        self.wait(self.is_over, seconds, "end")
        assert self.state == state, f"{self.state}: {self.output[-6000:]}"
        return self.output

    def wait(self, happened: Callable[[], bool], seconds: float, what: str) -> None:
        """Until something has happened, which must be before the job is over."""
        until = time.monotonic() + seconds
        while not happened():
            over = self.is_over()
            assert not over or happened(), f"{self.state} and did not {what}: {self.output[-6000:]}"
            assert time.monotonic() < until, f"{self.state}, did not {what} in {seconds} s: {self.output[-6000:]}"
            time.sleep(0.2)


@contextlib.contextmanager
def slurm_on_hosts(nodes: int, *, timeout: int = 20) -> Iterator[tuple[Slurm, Hosts]]:
    """A cluster whose nodes `n1`, ... are hosts.

    Args:
        nodes: of them.
        timeout: seconds without an answer after which Slurm gives up a node.
    """
    require(*PROGRAMS)
    with hosts(nodes, "ctl") as made:
        names = [name for name in made.addresses if name != "ctl"]
        places = [f"NodeName={name} NodeHostname={name} NodeAddr={made.addresses[name]}" for name in names]
        controller = f"ctl({made.addresses['ctl']})"
        with _slurm(made.folder, made.start, "ctl", controller, names, places, timeout) as slurm:
            yield slurm, made


@contextlib.contextmanager
def slurm_here(nodes: int) -> Iterator[Slurm]:
    """A cluster whose nodes `n1`, ... are daemons of this machine with ports of their own: it needs no namespaces.

    Args:
        nodes: of them.
    """
    require(*PROGRAMS)
    here = os.uname().nodename
    started: list[subprocess.Popen[Any]] = []

    def start(_: str, command: Sequence[object], env: dict[str, str] | None = None, **options: Any) -> Any:
        changes = {"PATH": f"{environment()['PATH']}:{SYSTEM_PATH}"} | (env or {})
        options = {"cwd": REPOSITORY, "start_new_session": True} | options
        started.append(subprocess.Popen(list(map(str, command)), env=environment() | changes, **options))
        return started[-1]

    names = [f"n{place}" for place in range(1, nodes + 1)]
    places = [f"NodeName={name} NodeHostname={here} NodeAddr=127.0.0.1 Port={free_port()}" for name in names]
    with tempfile.TemporaryDirectory(prefix="agsel-slurm-") as folder:
        try:
            with _slurm(Path(folder), start, here, f"{here}(127.0.0.1)", names, places, 20) as slurm:
                yield slurm
        finally:
            for process in started:
                process.kill()
                process.wait()


@contextlib.contextmanager
def _slurm(
    folder: Path, start: Starter, machine: str, controller: str, names: list[str], places: list[str], timeout: int
) -> Iterator[Slurm]:
    _write_configuration(folder, controller, names, places, timeout)
    slurm = Slurm(folder, start, machine)
    files = [f"--{kind}-file={folder}/munged.{kind}" for kind in ("key", "pid", "log", "seed")]
    munged = [find("munged"), "--foreground", "--force", f"--socket={folder}/munge.socket", *files]
    slurmctld = [find("slurmctld"), "-c", "-D", "-f", folder / "slurm.conf"]
    started = [start(machine, daemon, **_quiet()) for daemon in (munged, slurmctld)]
    for name in names:
        host = machine if machine != "ctl" else name
        started.append(start(host, [find("slurmd"), "-N", name, "-D", "-f", folder / "slurm.conf"], **_quiet()))
    try:
        _wait_until_idle(slurm, len(names))
        yield slurm
    finally:
        slurm.cancel()
        for daemon in started:
            daemon.terminate()
        for daemon in started:
            _end(daemon)


def _end(daemon: subprocess.Popen[Any]) -> None:
    try:
        daemon.wait(5)
    except subprocess.TimeoutExpired:  # one that waits for a step on a host that is gone
        daemon.kill()
        daemon.wait()


def _quiet() -> dict[str, Any]:
    return {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}


def _write_configuration(folder: Path, controller: str, names: list[str], places: list[str], timeout: int) -> None:
    folder.chmod(0o755)
    (folder / "state").mkdir()
    key = folder / "munged.key"
    key.touch(0o600)
    key.write_bytes(os.urandom(128))
    for gpu in range(GPUS):
        (folder / f"gpu{gpu}").touch()
    nodes = "".join(f"{place} CPUs=32 RealMemory=8000 Gres=gpu:{GPUS}\n" for place in places)
    head = f"SlurmctldHost={controller}\nSlurmctldPort={free_port()}\n"
    text = CONFIGURATION.format(folder=folder, timeout=timeout)
    (folder / "slurm.conf").write_text(head + nodes + text)
    gpus = f"Name=gpu File={folder}/gpu[0-{GPUS - 1}]"
    (folder / "gres.conf").write_text("AutoDetect=off\n" + "".join(f"NodeName={name} {gpus}\n" for name in names))


def _wait_until_idle(slurm: Slurm, nodes: int) -> None:
    until = time.monotonic() + 30
    states = ""
    while states.split() != ["idle"] * nodes:
        assert time.monotonic() < until, f"Slurm does not come up: {states}: {_logs(slurm.folder)}"
        command = ["sinfo", "--noheader", "--Node", "--format=%T"]
        states, _ = slurm.start(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True).communicate()
        time.sleep(0.2)


def _logs(folder: Path) -> str:
    return "".join(f"{path.name}: {path.read_text()[-1500:]}" for path in folder.glob("*.log"))
