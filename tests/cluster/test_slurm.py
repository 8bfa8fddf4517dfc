"""Slurm on hosts: what starts a run there, what stops it, and what happens when a rank or a host is lost."""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from agsel.runs.claim import LOCK
from agsel.runs.preemption import MARKER, STOP_FILE
from agsel.runs.slurm import first_host
from tests.cluster.hosts import Hosts
from tests.cluster.slurm_cluster import START, Job, Slurm, slurm_on_hosts
from tests.tiny_run import TRAIN, save_model, save_rows, settings

pytestmark = pytest.mark.cluster
JOB = "launch/train.sbatch"
TASKS = ("--ntasks-per-node=1", "--gpus-per-node=1", "--cpus-per-task=1")
PROBE = """
import os
from agsel.runs.launchers import set_environment
set_environment(patience=60)
names = "RANK LOCAL_RANK WORLD_SIZE LOCAL_WORLD_SIZE MASTER_ADDR MASTER_PORT SLURM_STEP_ID"
print("PROBE", *map(os.environ.get, names.split()), flush=True)
"""
ARRAY = """#!/usr/bin/env bash
#SBATCH --array=1-2
#SBATCH --ntasks-per-node=1
#SBATCH --requeue
#SBATCH --open-mode=append
exec bash launch/train.sbatch {folder}/seed-$SLURM_ARRAY_TASK_ID --seed $SLURM_ARRAY_TASK_ID "$@"
"""


class Cluster:
    """With what its runs need, in a folder that all hosts see."""

    def __init__(self, slurm: Slurm, hosts: Hosts) -> None:
        self.slurm, self.hosts, self.folder = slurm, hosts, slurm.folder
        self.parts = save_model(self.folder / "model"), save_rows(self.folder / "rows.jsonl", 32)

    def arguments(self, run: Path, **changed: object) -> list[str]:
        """Those of a run that ends after the steps that stand in a file; `steps` writes it."""
        chosen = {"max_steps": None, "logging_steps": 1} | changed
        return ["--config", str(self._recipe(run)), *settings(*self.parts, run, **chosen)]

    def steps(self, run: Path, number: int) -> None:
        self._recipe(run).write_text(f"max_steps: {number}\n")

    def submit(self, name: str, *options: object, nodes: int = 2, restarts: int | None = None, **more: object) -> Job:
        """Start train.sbatch with an endless run."""
        run = self.folder / name
        self.steps(run, 100_000)
        again = [] if restarts is None else ["--restarts", restarts]
        arguments = self.arguments(run, output_dir=None, **more)
        return self.slurm.submit(f"--nodes={nodes}", *TASKS, *options, JOB, *again, run, *arguments)

    def let_end(self, run: Path, recipe_of: Path | None = None) -> Path:
        """Let the next start of a run end three steps after its newest checkpoint, which is returned."""
        checkpoint = max(run.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
        self.steps(recipe_of or run, int(checkpoint.name.split("-")[1]) + 3)
        return checkpoint

    def ranks(self, host: str) -> list[psutil.Process]:
        """Processes of runs on a host, without those that they have started themselves."""
        runs = self.processes(host, "launch/train.py")
        own = {process.pid for process in runs}
        return [process for process in runs if process.ppid() not in own]

    def processes(self, host: str, argument: object) -> list[psutil.Process]:
        """Those on a host whose first argument this is."""
        found = []
        for pid in self.hosts.processes(host):
            with suppress(psutil.NoSuchProcess):
                process = psutil.Process(pid)
                if process.cmdline()[1:2] == [str(argument)]:
                    found.append(process)
        return found

    def _recipe(self, run: Path) -> Path:
        return self.folder / f"{run.name}.yaml"


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with slurm_on_hosts(3) as (slurm, hosts):
        yield Cluster(slurm, hosts)


@pytest.fixture(autouse=True)
def without_jobs(request: pytest.FixtureRequest) -> Iterator[None]:
    """The two cores are for the next test."""
    yield
    if "cluster" in request.fixturenames:
        request.getfixturevalue("cluster").slurm.cancel()


def require_one_run(output: str, ranks: int) -> None:
    assert f"float32, {ranks} ranks" in output
    assert output.count("done      ") == 1


def require_resumed(output: str, checkpoint: Path) -> None:
    assert f"{checkpoint}, every file verified" in output
    assert output.count("done      ") == 1
    assert (checkpoint.parent / "model" / "model.safetensors").exists()


@pytest.mark.parametrize("hosts", ["n1,n[2-3]", "gpu[07,01-03],login", "r[2,4]n[08-10]"])
def test_the_first_host_of_a_list_is_that_of_scontrol(hosts: str, cluster: Cluster) -> None:
    assert first_host(hosts) == cluster.slurm.run("scontrol", "show", "hostnames", hosts).split()[0]


def test_tasks_of_steps_know_their_place_and_do_not_meet_those_of_others(cluster: Cluster) -> None:
    """Two steps of a job, at once, with tasks spread unevenly."""
    (cluster.folder / "probe.py").write_text(PROBE)
    step = f"srun --overlap --nodes=2 --ntasks=3 python {cluster.folder}/probe.py"
    job = cluster.slurm.submit("--nodes=2", "--ntasks=3", "--wrap", f"{step} & {step} & wait")
    found = sorted(line.split()[1:] for line in re.findall(r"PROBE .*", job.ends("COMPLETED")))
    places = [["0", "0", "3", "2", "n1"], ["1", "1", "3", "2", "n1"], ["2", "0", "3", "1", "n1"]]
    assert [values[:5] for values in found] == sorted(places * 2)
    assert len({(step, port) for *_, port, step in found}) == len({port for *_, port, _ in found}) == 2


def test_srun_alone_is_one_run(cluster: Cluster) -> None:
    """Also with Slurm's own PMI."""
    arguments = settings(*cluster.parts, cluster.folder / "srun", max_steps=1)
    output = cluster.slurm.run("srun", "--mpi=pmi2", "--nodes=2", "--ntasks=3", "python", TRAIN, *arguments)
    require_one_run(output, 3)


def test_deepspeed_with_srun_is_one_run(cluster: Cluster) -> None:
    hostfile = cluster.folder / "hostfile"
    hostfile.write_text("n1 slots=1\nn2 slots=1\n")
    command = ["deepspeed", "--launcher", "slurm", "--hostfile", hostfile, "--no_ssh_check", TRAIN]
    arguments = settings(*cluster.parts, cluster.folder / "deepspeed", max_steps=1)
    require_one_run(cluster.slurm.run("salloc", "--nodes=2", "--ntasks=2", *command, *arguments), 2)


def test_a_run_goes_on_over_its_time_limit(cluster: Cluster) -> None:
    """In a folder that is a link to one of another file system, perhaps."""
    (cluster.folder / "elsewhere").mkdir()
    (cluster.folder / "limited").symlink_to(cluster.folder / "elsewhere")
    job = cluster.submit("limited", "--time=2", "--signal=B:USR1@20")
    job.says("queued again, restart 1")
    checkpoint = cluster.let_end(cluster.folder / "limited")
    output = job.ends("COMPLETED")
    require_resumed(output, checkpoint)
    assert re.search(r"a save takes \d+ s, the start took \d+ s: warn a job at least \d+ s before its end", output)


def require_refused_after_warning(job: Job, cluster: Cluster) -> None:
    output = job.ends("FAILED")
    assert re.search(r"warning came \d+ s after the start, before a step: raise --time", output)
    assert cluster.slurm.facts(job.number)["Restarts"] == "0"


def test_a_time_limit_that_leaves_no_step_is_refused(cluster: Cluster) -> None:
    """As with `--time 5` and a warning 5 minutes before the end: the rank hears of it when it has begun."""
    job = cluster.submit("hurried", "--nodelist=n1", nodes=1)
    job.wait(lambda: bool(cluster.ranks("n1")), START, "start a rank")
    [rank] = cluster.ranks("n1")
    rank.suspend()
    cluster.slurm.run("scancel", "--batch", "--signal=USR1", job.number)
    job.wait((cluster.folder / "hurried" / STOP_FILE).exists, 60, "hear of the warning")
    rank.resume()
    require_refused_after_warning(job, cluster)


def test_a_warning_before_the_ranks_are_started_is_not_lost(cluster: Cluster) -> None:
    """While the job's script waits for its file system, here for a named pipe, and then takes STOP files away."""
    lock = cluster.folder / "early" / LOCK
    lock.parent.mkdir()
    os.mkfifo(lock)
    held = os.open(lock, os.O_RDWR)
    job = cluster.submit("early", "--nodelist=n1", nodes=1)
    job.wait(lambda: bool(cluster.processes("n1", lock)), START, "look at the run folder")
    cluster.slurm.run("scancel", "--batch", "--signal=USR1", job.number)
    time.sleep(1)
    assert cluster.processes("n1", lock)
    lock.unlink()
    os.close(held)
    require_refused_after_warning(job, cluster)


def test_one_of_two_jobs_trains_in_a_folder_and_dependants_wait_for_its_end(cluster: Cluster) -> None:
    first = cluster.submit("common")
    dependant = cluster.slurm.submit(f"--dependency=afterok:{first.number}", "--wrap", "true")
    first.says(r"step +3/")
    second = cluster.submit("common", restarts=5)
    assert "another run trains in" in second.ends("FAILED")
    assert cluster.slurm.facts(second.number)["Restarts"] == "0"
    steps = len(re.findall("/100000", first.output))
    first.says("/100000", times=steps + 3)
    cluster.slurm.run("scancel", "--signal=USR1", first.number)
    first.ends("FAILED")
    assert cluster.slurm.facts(first.number)["ExitCode"] == "75:0"
    assert "SIGUSR1" in json.loads((cluster.folder / "common" / MARKER).read_text())["reason"]
    reason = "DependencyNeverSatisfied"
    dependant.wait(lambda: cluster.slurm.facts(dependant.number)["Reason"] == reason, 30, f"wait with {reason}")


def test_a_stopped_run_of_plain_srun_ends_so_that_its_job_fails(cluster: Cluster) -> None:
    run = cluster.folder / "plain"
    cluster.steps(run, 100_000)
    job = cluster.slurm.submit(*TASKS, "--wrap", " ".join(["srun python", str(TRAIN), *cluster.arguments(run)[:-2]]))
    job.says(r"step +3/")
    (run / STOP_FILE).touch()
    job.ends("FAILED")
    assert cluster.slurm.facts(job.number)["ExitCode"] == "75:0"


def test_a_killed_rank_ends_the_job_which_is_restarted_as_often_as_asked(cluster: Cluster) -> None:
    job = cluster.submit("killed", restarts=1, save_strategy="steps", save_steps=5)
    for start in (1, 2):
        job.says(r"save   ", times=start)
        [rank] = cluster.ranks("n2")
        rank.kill()
        killed = time.monotonic()
        job.says("error: n2: task 1: Killed", times=start)
        if start == 1:
            job.says(r"failed with exit code \d+ after saving step .*: queued again, restart 1 of 1")
            assert time.monotonic() - killed < 60
    output = job.ends("FAILED", 60)
    assert "the 1 restarts are used up" in output
    assert re.search(r"checkpoint-\d+, every file verified", output)


def test_restarts_without_progress_end(cluster: Cluster) -> None:
    job = cluster.submit("hopeless", nodes=1, restarts=9, learning_rate="many")
    output = job.ends("FAILED")
    assert "like the restart before it: not queued again" in output
    assert cluster.slurm.facts(job.number)["Restarts"] == "2"


def test_restarts_that_cannot_be_counted_end(cluster: Cluster) -> None:
    """As on a full disk, where each would fail like the one before."""
    (cluster.folder / "full" / ".restarts").mkdir(parents=True)
    job = cluster.submit("full", nodes=1, restarts=9, learning_rate="many")
    assert "not queued again, as nothing can be written to" in job.ends("FAILED")
    assert cluster.slurm.facts(job.number)["Restarts"] == "0"


def test_a_run_folder_that_one_host_does_not_see_is_refused(cluster: Cluster) -> None:
    (cluster.folder / "local").mkdir()
    cluster.hosts.hide("n2", cluster.folder / "local")
    output = cluster.submit("local/run", "--nodelist=n1,n2").ends("FAILED")
    assert "error: rank 1 on host n2 does not see the run folder" in output
    assert "step " not in output


def test_a_task_of_an_array_is_queued_again_alone(cluster: Cluster) -> None:
    """Also the last one, whose number is that of the array."""
    script, recipe = cluster.folder / "array.sh", cluster.folder / "array"
    script.write_text(ARRAY.format(folder=cluster.folder))
    cluster.steps(recipe, 100_000)
    job = cluster.slurm.submit(*TASKS, script, *cluster.arguments(recipe, output_dir=None))
    first, last = (Job(cluster.slurm, f"{job.number}_{task}") for task in (1, 2))
    for task in (first, last):
        task.says(r"step +3/100000")
    cluster.slurm.run("scancel", "--batch", "--signal=USR1", last.number)
    last.says("queued again, restart 1")
    (cluster.folder / "seed-1" / STOP_FILE).touch()
    first.ends("FAILED")
    checkpoint = cluster.let_end(cluster.folder / "seed-2", recipe_of=recipe)
    require_resumed(last.ends("COMPLETED"), checkpoint)
    assert [cluster.slurm.facts(task.number)["Restarts"] for task in (first, last)] == ["0", "1"]


def test_a_lost_host_is_replaced_by_a_spare_one(cluster: Cluster) -> None:
    """The last test: the host does not come back."""
    job = cluster.submit("replaced", save_strategy="steps", save_steps=5)
    job.says(r"save   ")
    cluster.hosts.kill_host("n2" if job.node == "n1" else "n1")
    job.says("every file verified")
    cluster.slurm.run("scancel", job.number)
    job.ends("CANCELLED", 60)
    assert cluster.slurm.facts(job.number)["Restarts"] == "1"


@pytest.mark.parametrize("lose", [Hosts.kill_host, Hosts.cut_link], ids=lambda way: way.__name__)
def test_a_lost_host_ends_the_ranks_and_the_job(lose: Callable[[Hosts, str], None]) -> None:
    """Long before Slurm notices."""
    with slurm_on_hosts(2, timeout=600) as (slurm, hosts):
        cluster = Cluster(slurm, hosts)
        job = cluster.submit("lost", "--no-requeue", rank_timeout=20, ddp_timeout=60)
        job.says(r"step +3/")
        lose(hosts, "n2")
        lost = time.monotonic()
        job.says(r"rank 1 \(host n2, pid \d+\) has not answered for 20 s")
        assert time.monotonic() - lost < 30
        # For as long as Slurm does not give up the host, the job is "completing" there.
        job.wait(lambda: slurm.facts(job.number)["ExitCode"] == "137:0", lost + 80 - time.monotonic(), "fail")
        assert slurm.facts(job.number)["Reason"] == "NonZeroExitCode"
