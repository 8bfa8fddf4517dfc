"""`train.sh --hostfile` with pdsh and ssh on two hosts: stops, deaths, restarts, and what is refused."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from importlib.metadata import distribution
from pathlib import Path

import psutil
import pytest

from agsel.runs import rank_log
from agsel.runs.checkpoints import missing_part
from agsel.runs.preemption import MARKER, STOP_FILE
from tests.cluster.hosts import Hosts, hosts, require
from tests.distributed import free_port
from tests.tiny_run import TRAIN, save_model, save_rows, settings

pytestmark = pytest.mark.cluster

START = 150
"""Seconds that a start may take where others use the cores."""
TIMEOUT = 10
"""`--rank_timeout` of these runs."""
END = 60
"""Seconds after it, within which the command ends."""
ODD = "a 'b\" $HOME `c` \\d%n\n"
"""What no quotes protect; pdsh would put a number in the place of %n."""


class Job:
    """`train.sh --hostfile` on the first host, in a run folder whose name has a space, with ranks on both."""

    def __init__(self, made: Hosts, name: str, **changed: object) -> None:
        self.made, self.folder = made, made.folder / name / "the run"
        self.folder.parent.mkdir()
        parts = made.folder / "model", made.folder / "rows.jsonl"
        common = {"output_dir": None, "max_steps": 100_000, "logging_steps": 1, "rank_timeout": TIMEOUT}
        self._settings = settings(*parts, self.folder, **(common | changed))
        self._output = self.folder.parent / "output"

    def start(self, *options: object) -> None:
        command = ["bash", "launch/train.sh", *options, "--hostfile", self.made.folder / "hostfile", self.folder]
        variables = {"AGSEL_ODD": ODD, "HF_HOME": str(self.folder.parent / "cache")}
        with self._output.open("w") as file:
            self.process = self.made.start(
                "n1", [*command, *self._settings], env=variables, stdout=file, stderr=subprocess.STDOUT
            )

    @property
    def output(self) -> str:
        return self._output.read_text(errors="replace")

    def log(self, rank: int) -> str:
        return (self.folder / "logs" / f"rank-{rank}.log").read_text()

    def trains(self, starts: int = 1) -> None:
        """Wait until a step is logged after so many starts."""
        steps = rf"(?s)(selection method.*?step +\d+/.*?){{{starts}}}"
        self._wait(lambda: re.search(steps, self.output) is not None, START)

    def rank(self, number: int) -> psutil.Process:
        [*_, pid] = re.findall(rf"^{rank_log.BEGAN} .* pid (\d+)$", self.log(number), re.M)
        return psutil.Process(int(pid))

    def ends(self, seconds: float) -> int:
        """The exit code, if it ends in time, and with it all its processes."""
        self._wait(lambda: self.process.poll() is not None, seconds, going_on=False)
        self._wait(lambda: not self._pythons(), 5, going_on=False)  # launch.py looks at its ranks once a second
        return self.process.returncode

    def stopped_by(self) -> str:
        """What the marker says; the checkpoint that it names is complete."""
        marker = json.loads((self.folder / MARKER).read_text())
        assert missing_part(Path(marker["checkpoint"])) is None
        return marker["reason"]

    def _pythons(self) -> list[psutil.Process]:
        """Processes of Python on the hosts."""
        found = []
        for pid in (pid for host in self.made.addresses for pid in self.made.processes(host)):
            with suppress(psutil.NoSuchProcess):
                if psutil.Process(pid).name().startswith("python"):
                    found.append(psutil.Process(pid))
        return found

    def _wait(self, happened: Callable[[], bool], seconds: float, *, going_on: bool = True) -> None:
        until = time.monotonic() + seconds
        while not happened():
            assert time.monotonic() < until, f"not in {seconds} s: {self.output[-6000:]}"
            assert not going_on or self.process.poll() is None, self.output[-6000:]
            time.sleep(0.2)


@pytest.fixture
def made() -> Iterator[Hosts]:
    require("pdsh", "bash")
    with hosts(2) as two:
        (two.folder / "hostfile").write_text("# first the host of rank 0\nn1 slots=1\n\nn2   slots=1\n")
        save_model(two.folder / "model")
        save_rows(two.folder / "rows.jsonl", 32)
        yield two


def test_a_run_outlives_its_launcher_a_rank_and_a_stop(made: Hosts) -> None:
    job = Job(made, "job", save_strategy="steps", save_steps=2)
    job.start("--restarts", 2)
    job.trains()
    assert [job.rank(rank).environ()["AGSEL_ODD"] for rank in (0, 1)] == [ODD, ODD]
    assert ["Tokenising" in job.log(rank) for rank in (0, 1)] == [True, False], "HF_HOME is common"
    [pdsh] = [found for found in psutil.Process(job.process.pid).children(recursive=True) if found.name() == "pdsh.bin"]
    pdsh.kill()
    job.trains(starts=2)
    assert "the output is lost (Broken pipe) on rank 0 after step " in job.log(0)
    assert job.output.count("train.sh  the run ended early (exit code ") == 1

    dead = job.rank(1)
    dead.kill()
    job.trains(starts=3)
    assert f"train.sh  rank 1 of 2, host n2, pid {dead.pid}: it was killed, or its host is gone" in job.output
    assert len(re.findall(r"checkpoint-\d+, every file verified", job.output)) == 2
    job.process.send_signal(signal.SIGTERM)
    assert job.ends(60) == 0
    assert job.stopped_by() == "a STOP file on rank 0"
    assert not (job.folder / STOP_FILE).exists()
    assert not list(job.folder.glob("_environment*"))

    job.start()
    job.trains()
    made.kill_host("n2")
    assert job.ends(TIMEOUT + END) != 0
    assert "train.sh  host n2 does not answer" in job.output
    assert re.search(r"train\.sh  rank 1 of 2, host n2, pid \d+: it was killed, or its host is gone", job.output)


def test_a_link_that_is_cut_ends_the_command(made: Hosts) -> None:
    job = Job(made, "cut")
    (job.folder.parent / "cache").mkdir()
    made.hide("n2", job.folder.parent / "cache")
    job.start()
    job.trains()
    assert ["Tokenising" in job.log(rank) for rank in (0, 1)] == [True, True], "HF_HOME is of each host"
    made.cut_link("n2")
    assert job.ends(TIMEOUT + END) != 0
    assert re.search(r"agsel: error: rank 1 \(host n2, pid \d+\) has not answered for 10 s", job.output)
    assert "train.sh  host n2 does not answer" in job.output


def test_a_rank_that_stands_still_ends_the_command(made: Hosts) -> None:
    """Nobody on its host is left to kill it. Rank 0 has the store of the ranks."""
    job = Job(made, "still")
    job.start()
    job.trains()
    still = job.rank(0)
    still.suspend()
    assert job.ends(TIMEOUT + END) != 0
    assert f"agsel: error: rank 0 (host n1, pid {still.pid}) has not answered for 10 s" in job.output
    assert f"train.sh  rank 0 of 2, host n1, pid {still.pid}: it stood still" in job.output


def refused(made: Hosts, text: str | None, env: dict[str, str] | None = None, options: str = "--hostfile") -> str:
    """The one line by which train.sh refuses a hostfile, at once, whatever restarts it has."""
    hostfile = made.folder / "refused"
    if text is not None:
        hostfile.write_text(text)
    command = ["bash", "launch/train.sh", "--restarts", 3, options, hostfile, made.folder / "run", "--max_steps", 1]
    process = made.start("n1", command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 2, output
    [line] = output.splitlines()
    return line.removeprefix("agsel: error: ")


def test_what_cannot_work_is_refused_at_once_in_one_line(made: Hosts) -> None:
    both, run = "n1 slots=1\nn2 slots=1\n", made.folder / "run"
    assert "(--hostfile), [Errno 2] No such file" in refused(made, None)
    assert "(--hostfile) names no host: write a line" in refused(made, "# none\n\n")
    assert "line 2 is 'n2': it must be HOST slots=GPUS" in refused(made, "n1 slots=1\nn2\n")
    assert "line 2 names n1 again" in refused(made, "n1 slots=1\nn1 slots=2\n")
    assert "--host_file" in refused(made, both, options="--host_file")
    unknown = refused(made, "n1 slots=1\nn9 slots=1")
    assert "host n9 cannot be reached by ssh (ssh: Could not resolve hostname n9" in unknown
    made.run("n1", ["mount", "--bind", shutil.which("true"), shutil.which("hostname")])
    assert "`hostname -I` on n1 knows no address: set MASTER_ADDR" in refused(made, both)
    made.run("n1", ["umount", shutil.which("hostname")])
    assert "PYTHONSTARTUP is 'a\"b'" in refused(made, both, {"PYTHONSTARTUP": 'a"b'})
    variables = made.folder / "variables"
    variables.write_text("A=1\n\n")
    assert f"{variables}, line 2 is ''" in refused(made, both, {"DS_ENV_FILE": str(variables)})
    without = made.folder / "without_pdsh"
    without.mkdir()
    for name in ("nsenter", "bash", "mkdir", "rm", "dirname", "setsid", "ps", "ssh", "grep", "sleep"):
        (without / name).symlink_to(str(shutil.which(name)))
    (without / "python").symlink_to(sys.executable)
    assert f"not installed for {without / 'python'}: psutil" in refused(made, both, {"PATH": str(without)})
    (without / "python").unlink()
    (without / "python").write_text(f'#!{shutil.which("bash")}\nexec {sys.executable} "$@"\n')
    (without / "python").chmod(0o755)
    assert refused(made, both, {"PATH": str(without)}).startswith("pdsh is not installed on this host")
    run.mkdir(exist_ok=True)
    made.hide("n2", run)
    assert f"host n2 does not see {run}: choose a run folder that all hosts share" in refused(made, both)
    made.run("n2", ["umount", run])
    made.hide("n2", Path(str(distribution("trl").locate_file(""))) / f"trl-{distribution('trl').version}.dist-info")
    assert re.search("host n2 has .*, trl None, and this one .*: install the same on all hosts", refused(made, both))
    made.cut_link("n2")
    assert "host n2 cannot be reached by ssh (ssh: connect to host n2 port 22: " in refused(made, both)


def test_a_run_folder_that_one_host_does_not_see_is_refused_by_the_ranks(made: Hosts) -> None:
    """Whoever starts them."""
    run, port = made.folder / "run", str(free_port())
    run.mkdir()
    made.hide("n2", run)
    arguments = settings(made.folder / "model", made.folder / "rows.jsonl", run)
    processes = []
    for rank, name in enumerate(made.addresses):
        place = {"RANK": str(rank), "LOCAL_RANK": "0", "WORLD_SIZE": "2"}
        place |= {"MASTER_ADDR": made.addresses["n1"], "MASTER_PORT": port}
        command = [sys.executable, TRAIN, *arguments]
        processes.append(
            made.start(name, command, env=place, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        )
    output = "".join(process.communicate(timeout=START)[0] for process in processes)
    assert [process.returncode for process in processes] == [2, 2], output
    [line] = [line for line in output.splitlines() if "agsel: error: " in line]
    assert f"rank 1 on host n2 does not see the run folder {run} that rank 0 on host n1 has made" in line
    assert os.listdir(run) == []
