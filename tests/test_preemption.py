"""Runs of `launch/train.py` that are stopped early, by a file or by signals to each process of `deepspeed`.

Each case hits one phase of the run, as tests/announcing_train.py announces it.
"""

from __future__ import annotations

import json
import logging
import os
import re
import signal
import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file

from agsel.monitor.history import METRICS, SELECTION, SelectionHistory, read_lines
from agsel.runs import rank_log
from agsel.runs.checkpoints import STAGING, checkpoints_in, missing_part
from agsel.runs.outliving import outliving_output
from agsel.runs.preemption import MARKER, SIGNALS, STOP_FILE, SignalWatch
from launch import hosts
from tests.distributed import free_port, launch, run_ranks
from tests.live_run import LiveRun, announced_run, announcing, live_run
from tests.tiny_run import TRAIN, save_model, save_rows, settings

EVALUATING = {"eval_strategy": "steps", "eval_steps": 5, "dataset_test_split": "train"}
SAVING = {"save_strategy": "steps", "save_steps": 5}


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A model folder and a data file; 8 steps of 2 examples x 2 ranks are an epoch."""
    folder = tmp_path_factory.mktemp("parts")
    return save_model(folder / "model"), save_rows(folder / "rows.jsonl", 32)


def ten_steps(parts: tuple[Path, Path], run: Path, **changed: object) -> list[str]:
    return settings(*parts, run, **({"max_steps": 10, "learning_rate": 1e-3, "logging_steps": 1} | changed))


@pytest.fixture(scope="module")
def unbroken(parts: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    """The weights after ten steps in one go, without evaluation."""
    run = tmp_path_factory.mktemp("unbroken")
    run_ranks(TRAIN, *ten_steps(parts, run))
    return load_file(run / "model" / "model.safetensors")


def require_stopped_after(step: int, reason: str, run: LiveRun) -> None:
    """The run folder holds one complete checkpoint of that step, a marker that names it, and nothing half done."""
    output = run.ends()
    marker = json.loads((run.folder / MARKER).read_text())
    assert marker["step"] == step, output[-6000:]
    assert re.fullmatch(reason, marker["reason"])
    said = (
        f"stopped   {marker['reason']} after step {step}; go on with the same command and --resume_from_checkpoint auto"
    )
    assert output.count(f"{said}\n") == 1
    assert marker["checkpoint"] == str(run.folder / f"checkpoint-{step}")
    assert missing_part(Path(marker["checkpoint"])) is None
    assert checkpoints_in(run.folder)[-1] == Path(marker["checkpoint"])
    assert not (run.folder / STAGING).exists()
    assert not (run.folder / STOP_FILE).exists()
    assert not (run.folder / "model").exists()
    assert output.count("Traceback") == output.count("\nKeyboardInterrupt"), "that of the launcher's runner alone"


def require_goes_on_as(unbroken: dict[str, torch.Tensor], run: Path, *, after: int) -> None:
    """Resumed with the configuration it has written, the run ends with the weights of the unbroken one, bit for bit."""
    result = launch(TRAIN, "--config", run / "config.yaml", "--resume_from_checkpoint", "auto")
    assert result.returncode == 0, result.stdout[-6000:]
    assert [int(step) for step in re.findall(r"^step +(\d+)/10  epoch \S+  loss ", result.stdout, re.M)] == [
        *range(after + 1, 11)
    ]
    assert f"checkpoint-{after}, every file verified" in result.stdout
    assert not (run / MARKER).exists()
    trained = load_file(run / "model" / "model.safetensors")
    assert trained.keys() == unbroken.keys()
    for name, weight in unbroken.items():
        assert torch.equal(trained[name], weight), name
    assert [line["step"] for line in read_lines(run / METRICS) if "loss" in line] == [*range(1, 11)]
    assert SelectionHistory.read(run / SELECTION).steps == [*range(1, 11)]


@pytest.mark.slow
def test_sigterm_to_one_rank_in_the_first_step(parts: tuple[Path, Path], tmp_path: Path) -> None:
    with announced_run(tmp_path, "step 1", ten_steps(parts, tmp_path)) as run:
        run.send(signal.SIGTERM, "rank 1", run.reaches("step 1"))
        require_stopped_after(1, "SIGTERM on rank 1", run)


@pytest.mark.slow
def test_sigusr1_to_one_rank_in_the_middle_of_an_epoch(
    parts: tuple[Path, Path], tmp_path: Path, unbroken: dict[str, torch.Tensor]
) -> None:
    arguments = ten_steps(parts, tmp_path)
    with announced_run(tmp_path, "step 3", arguments) as run:
        run.send(signal.SIGUSR1, "rank 0", run.reaches("step 3"))
        require_stopped_after(3, "SIGUSR1 on rank 0", run)
    require_goes_on_as(unbroken, run.folder, after=3)


def test_sigterm_to_all_processes_in_an_evaluation(
    parts: tuple[Path, Path], tmp_path: Path, unbroken: dict[str, torch.Tensor]
) -> None:
    """As a terminal or a scheduler sends it: the launcher's processes are hit too."""
    arguments = ten_steps(parts, tmp_path, **EVALUATING, **SAVING)
    with announced_run(tmp_path, "evaluation", arguments) as run:
        run.send(signal.SIGTERM, "group", run.reaches("evaluation"))
        require_stopped_after(5, "SIGTERM on rank 0", run)
    assert "eval_loss" not in run.output
    require_goes_on_as(unbroken, run.folder, after=5)
    assert [line["step"] for line in read_lines(run.folder / METRICS) if "eval_loss" in line] == [5, 10]


def test_a_stopped_run_keeps_the_checkpoint_to_go_on_from_beside_the_best_one(
    parts: tuple[Path, Path], tmp_path: Path
) -> None:
    """The Trainer would delete it if one checkpoint may stay, and load the weights of the best one. Ctrl-C stops it."""
    best = {"load_best_model_at_end": "true", "save_total_limit": 1}
    with announced_run(tmp_path, "step 7", ten_steps(parts, tmp_path, **EVALUATING, **SAVING, **best)) as run:
        run.send(signal.SIGINT, "group", run.reaches("step 7"))
        require_stopped_after(7, "(SIGINT|SIGTERM) on rank 0", run)  # launch.py passes SIGTERM on
    assert checkpoints_in(run.folder)[0] == run.folder / "checkpoint-5"


@pytest.mark.slow
def test_sigusr1_in_the_last_step(parts: tuple[Path, Path], tmp_path: Path, unbroken: dict[str, torch.Tensor]) -> None:
    """Nothing is left to train then: resumed in the middle of an epoch, the run just exports."""
    arguments = ten_steps(parts, tmp_path)
    with announced_run(tmp_path, "step 10", arguments) as run:
        run.send(signal.SIGUSR1, "rank 0", run.reaches("step 10"))
        require_stopped_after(10, "SIGUSR1 on rank 0", run)
    require_goes_on_as(unbroken, run.folder, after=10)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_all_processes_with_workers_that_load_data(
    parts: tuple[Path, Path], tmp_path: Path, number: signal.Signals
) -> None:
    """The steps to come still need them."""
    arguments = ten_steps(parts, tmp_path, dataloader_num_workers=1)
    with announced_run(tmp_path, "step 3", arguments) as run:
        run.send(number, "group", run.reaches("step 3"))
        require_stopped_after(3, f"({number.name}|SIGTERM) on rank 0", run)  # launch.py passes SIGTERM on


@pytest.mark.slow
def test_two_signals_while_saving(parts: tuple[Path, Path], tmp_path: Path) -> None:
    """The checkpoint that is being written is completed, and that of the next step is the last."""
    with announced_run(tmp_path, "saving", ten_steps(parts, tmp_path, **SAVING)) as run:
        ranks = run.reaches("saving")
        run.send(signal.SIGUSR1, "rank 1", ranks)
        time.sleep(0.5)
        run.send(signal.SIGUSR1, "rank 1", ranks)
        require_stopped_after(6, "SIGUSR1 on rank 1", run)
    assert missing_part(run.folder / "checkpoint-5") is None


@pytest.mark.slow  # the tests above and below stop runs by SIGTERM and Ctrl-C to the group, and with it the launcher
@pytest.mark.parametrize(
    ("number", "target", "reason"),
    [
        (signal.SIGTERM, "launch.py", "SIGTERM on rank 0"),
        (signal.SIGHUP, "group", "SIGHUP on rank 0"),  # a closed terminal
        (signal.SIGINT, "runner", "the launcher is gone on rank 0"),
        (signal.SIGUSR1, "launch.py", "the launcher is gone on rank 0"),
        (signal.SIGKILL, "launch.py", "the launcher is gone on rank 0"),
        (signal.SIGTERM, "runner", "the launcher is gone on rank 0"),
        (signal.SIGUSR1, "runner", "the launcher is gone on rank 0"),
        (signal.SIGUSR1, "group", "SIGUSR1 on rank 0"),
    ],
)
def test_a_signal_to_the_launcher(
    parts: tuple[Path, Path], tmp_path: Path, number: signal.Signals, target: str, reason: str
) -> None:
    """`launch.py` passes SIGINT and SIGTERM on, as SIGTERM, and dies of the others; the runner dies of all."""
    with announced_run(tmp_path, "step 3", ten_steps(parts, tmp_path)) as run:
        run.send(number, target, run.reaches("step 3"))
        require_stopped_after(3, reason, run)


@pytest.fixture
def handlers() -> Iterator[None]:
    """Those of this process are as before at the end."""
    before = {number: signal.getsignal(number) for number in SIGNALS}
    yield
    signal.set_wakeup_fd(-1)
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_asks_for_a_stop_unless_it_was_ignored_before(number: signal.Signals, handlers: None) -> None:
    signal.signal(number, signal.SIG_DFL)
    watch = SignalWatch()
    assert watch.look() is None
    signal.raise_signal(number)
    assert watch.look() == number.name
    signal.signal(number, signal.SIG_IGN)
    watch = SignalWatch()
    signal.raise_signal(number)
    assert watch.look() is None
    assert signal.getsignal(number) == signal.SIG_IGN


def test_a_system_that_hides_the_processes_of_others_is_no_fault(
    handlers: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As with /proc mounted with hidepid=1."""

    def hide(process: psutil.Process) -> None:
        raise psutil.AccessDenied(process.pid)

    monkeypatch.setattr(psutil.Process, "parent", hide)
    assert SignalWatch().look() is None


@pytest.mark.parametrize("lost", ["Broken pipe", "No space left on device"])
def test_a_write_that_fails_asks_for_a_stop_and_breaks_nothing(lost: str, monkeypatch: pytest.MonkeyPatch) -> None:
    noted: list[str] = []
    copied: list[str] = []
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer if lost == "Broken pipe" else "/dev/full", "w") as stream:
        monkeypatch.setattr(sys, "stdout", stream)
        handler = logging.StreamHandler(stream)  # as of a library that was imported before
        logging.getLogger(__name__).addHandler(handler)
        with outliving_output(noted.append, copied.append):
            for text in ("one", "two"):
                print(text, flush=True)
            handler.handle(logging.makeLogRecord({"msg": "three"}))
        logging.getLogger(__name__).removeHandler(handler)
    assert noted == [f"the output is lost ({lost})"]
    assert "".join(copied) == "one\ntwo\nthree\n"


def test_output_that_nobody_reads_any_more(parts: tuple[Path, Path], tmp_path: Path) -> None:
    """As of `deepspeed ... | tee log` without its tee, or of a terminal that is gone: the next line is for nobody."""
    port = free_port()
    command = ["bash", "-c", '"$@" 2>&1 | cat', "bash", *announcing("step 3", port), *ten_steps(parts, tmp_path)]
    with live_run(tmp_path, command, port) as run:
        run.reaches("step 3")
        [reader] = [process for process in run.processes() if process.name() == "cat"]
        reader.kill()
        run.ends()
    marker = json.loads((tmp_path / MARKER).read_text())
    assert marker["reason"] == "the output is lost (Broken pipe) on rank 0"
    assert marker["step"] in (3, 4)
    assert missing_part(Path(marker["checkpoint"])) is None
    require_logged(run)


def require_logged(run: LiveRun) -> None:
    """Each rank has a log of what it printed, also of what nobody could read; of its lines, only one prints most."""
    logs = [(run.folder / "logs" / f"rank-{rank}.log").read_text() for rank in (0, 1)]
    for rank, log in enumerate(logs):
        began, *_, ended = log.splitlines()
        assert re.fullmatch(rf"== began \S+, rank {rank} of 2, host {socket.gethostname()}, pid \d+", began)
        assert re.fullmatch(r"== ended \S+, exit code 0", ended)
        assert "step 3\n" in log
    assert "== asked to stop, the output is lost (Broken pipe)\n" in logs[0]
    assert "stopped   the output is lost (Broken pipe) on rank 0 after step " in logs[0]
    assert "stopped   " not in logs[1]


def test_the_launcher_of_several_hosts_knows_the_lines_of_the_logs() -> None:
    """It does not import what takes seconds."""
    assert (hosts.BEGAN, hosts.ENDED, hosts.ASKED) == (rank_log.BEGAN, rank_log.ENDED, rank_log.ASKED)


@pytest.mark.slow  # tests/test_job_files.py stops a run in this way, too
def test_a_stop_file(parts: tuple[Path, Path], tmp_path: Path) -> None:
    with announced_run(tmp_path, "step 3", ten_steps(parts, tmp_path)) as run:
        run.reaches("step 3")
        (run.folder / STOP_FILE).touch()
        require_stopped_after(3, "a STOP file on rank 0", run)
