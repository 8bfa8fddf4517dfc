"""Start `launch/train.py` on the hosts of a hostfile, wait for all of its ranks, and name those that were killed.

python launch/hosts.py HOSTFILE RUN_FOLDER --config RECIPE ...

`train.sh --hostfile` runs it, again for each restart. DeepSpeed's own command starts the ranks, by pdsh and ssh. What
that leaves to its user is done here: hosts are asked before whether they can take part, and get the environment of this
process; a free port is chosen; a connection that is dead ends. And it stays until the ranks have ended, everywhere.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

try:
    import psutil
except ImportError:
    sys.stderr.write(f"agsel: error: not installed for {sys.executable}: psutil; start in the environment of the run\n")
    sys.exit(2)

TRAIN = Path(__file__).resolve().with_name("train.py")
REFUSED = 2
"""Exit code of what cannot work: starting it again would not help."""
SSH_OPTIONS = (
    *("BatchMode=yes", "ConnectTimeout=10", "ServerAliveInterval=5", "ServerAliveCountMax=3"),
    "ControlMaster=no",
)
"""Nobody is asked for a password, and a connection to a host that is gone ends within 20 seconds. None becomes one that
others share: it would stay."""
PASSED_ON = re.compile(
    r"(PATH|VIRTUAL_ENV|CONDA_PREFIX|LD_LIBRARY_PATH|LD_PRELOAD|LANG|LC_ALL|TMPDIR|XDG_CACHE_HOME|TOKENIZERS_PARALLELISM"
    r"|SSL_CERT_FILE|REQUESTS_CA_BUNDLE|(?i:(https?|no|all)_proxy)"
    r"|(PYTHON|DS_ACC|TORCH|PYTORCH|TRITON|HF_|TRANSFORMERS_|HUGGING|NCCL_|GLOO_|UCX_|FI_|MV2_|CUDA_|OMP_|MKL_|KMP_"
    r"|AGSEL_|WANDB_|MLFLOW|TENSORBOARD_)\w*)"
)
"""Names of variables that runs need on every host."""
PUT_INTO_COMMANDS = ("PYTHON", "MLFLOW", "MV2", "UCX", "NCCL")
"""How names begin of variables that DeepSpeed writes into the command of every host itself."""
PLAIN = re.compile(r"[\w@+=:,./-]+", re.ASCII)
"""Text that no shell changes, and neither pdsh, to which `%` is special."""
LAUNCH = "AGSEL_LAUNCH"
"""Variable by which the ranks of this launch are known."""
PATIENCE, PATIENCE_AT_START = 20.0, 120.0
"""Seconds for what a host is asked by ssh; at the start Python may come from a network file system."""
TICK = 2.0
"""Seconds between two looks."""
GRACE = 35.0
"""Seconds that ranks have to end when others have failed: DeepSpeed gives those of one host 30."""
LISTED = 8
"""Ranks that are named, at most."""
BEGAN, ENDED, ASKED = "== began", "== ended", "== asked to stop"
"""Lines of the ranks' logs, as in `agsel/runs/rank_log.py`, whose import would take seconds."""
FACTS = """
import importlib.metadata, json, platform, random, socket, subprocess
versions = [f"{name} {importlib.metadata.version(name)}" for name in ("torch", "deepspeed", "transformers", "trl")]
while True:
    port = random.SystemRandom().randrange(10_000, 30_000)
    with socket.socket() as probe:
        try:
            probe.bind(("", port))
        except OSError:
            continue
    break
addresses = subprocess.run("hostname -I", shell=True, capture_output=True, text=True).stdout.split()
print("agsel:", json.dumps([", ".join([f"Python {platform.python_version()}", *versions]), addresses[:1], port]))
"""
"""Printed by each host: what is installed, its address, and a free port below those that systems hand out."""


class RefusedError(Exception):
    """The launch cannot work as it is; says why in one line."""


@dataclass(frozen=True)
class Host:
    """One line of the hostfile.

    Attributes:
        name: for ssh.
        place: in the hostfile.
        ranks: its own.
    """

    name: str
    place: int
    ranks: range

    def run(self, command: str, patience: float) -> subprocess.CompletedProcess[str]:
        """Run a command there by ssh. The exit code is 255 if the host does not answer."""
        words = ["ssh", *ssh_arguments(), self.name, command]
        try:
            return subprocess.run(words, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=patience)
        except subprocess.TimeoutExpired:  # its sshd may live when its file systems do not
            return subprocess.CompletedProcess(words, 255, "", f"no answer within {patience:g} s")


def ssh_arguments() -> list[str]:
    """For every ssh, pdsh's too. Of two values of an option ssh takes the first: those of the user come first."""
    own = [word for option in SSH_OPTIONS for word in ("-o", option)]
    return shlex.split(os.environ.get("PDSH_SSH_ARGS_APPEND", "")) + own


def read_hostfile(path: Path) -> list[Host]:
    """The hosts, in the order of their ranks.

    Raises:
        RefusedError: the file cannot be read, or is none.
    """
    try:
        lines = path.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise RefusedError(f"cannot read {path} (--hostfile), {error}: give a file of lines HOST slots=GPUS") from error
    hosts: list[Host] = []
    for number, line in enumerate(lines, 1):
        text = line.partition("#")[0].strip()
        found = re.fullmatch(r"(\S+)\s+slots=0*([1-9]\d*)", text)
        if text and (found is None or text.startswith("-")):
            raise RefusedError(f"{path} (--hostfile), line {number} is {line!r}: it must be HOST slots=GPUS")
        if found is not None:
            if found[1] in [host.name for host in hosts]:
                raise RefusedError(f"{path} (--hostfile), line {number} names {found[1]} again: one line for each host")
            first = hosts[-1].ranks.stop if hosts else 0
            hosts.append(Host(found[1], len(hosts), range(first, first + int(found[2]))))
    if not hosts:
        raise RefusedError(f"{path} (--hostfile) names no host: write a line HOST slots=GPUS for each")
    return hosts


def quote(text: str) -> str:
    """Text as one word for the shell of a host, without spaces, to which DeepSpeed would add quotes of its own."""
    if PLAIN.fullmatch(text):
        return text
    return "$'" + "".join(chr(b) if PLAIN.match(chr(b)) else f"\\x{b:02x}" for b in os.fsencode(text)) + "'"


def require_tools() -> None:
    """Refuse what would fail for want of a program, or with a path that DeepSpeed cannot write into commands."""
    for program, package in (("pdsh", "pdsh"), ("ssh", "openssh-client")):
        if shutil.which(program) is None:
            raise RefusedError(f"{program} is not installed on this host: apt install {package}, or the like")
    for what, path in (("the current folder", os.getcwd()), ("Python", sys.executable), ("agsel", str(TRAIN))):
        if not PLAIN.fullmatch(path):
            raise RefusedError(f"{what} is in {path}: DeepSpeed needs a path without spaces and quotes")
    for name, value in os.environ.items():
        if name.startswith("PYTHON") and re.search(r'["$`\\\n]', value):
            raise RefusedError(f"{name} is {value!r}: DeepSpeed cannot pass on quotes, $ and \\: unset or change it")


def require_deepspeed_env() -> None:
    """Refuse a file of variables that DeepSpeed would not read to its end, or not pass on as it is."""
    name = os.environ.get("DS_ENV_FILE", ".deepspeed_env")
    for path in {Path.home() / name, Path(name).absolute()}:
        for number, line in enumerate(path.read_text().splitlines() if path.is_file() else [], 1):
            if not re.fullmatch(r'\s*[A-Za-z_]\w*\s*=[^"`\\]*', line):
                raise RefusedError(f"{path}, line {number} is {line!r}: it must be NAME=VALUE without quotes")


@contextmanager
def environment_file(run_folder: Path, launch: str) -> Iterator[Path]:
    """While inside, a script in the run folder that gives a shell the variables of this process.

    Unlike what DeepSpeed passes on, they may hold anything, and no list of processes shows them.

    Args:
        run_folder: seen by all hosts.
        launch: name of this launch.
    """
    variables = {name: value for name, value in os.environ.items() if PASSED_ON.fullmatch(name)} | {LAUNCH: launch}
    path = run_folder.absolute() / f"_environment-{launch}.sh"  # an upload of the folder to a model hub leaves it out
    try:
        run_folder.mkdir(parents=True, exist_ok=True)
        with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            file.writelines(f"export {name}={shlex.quote(value)}\n" for name, value in variables.items())
    except OSError as error:
        raise RefusedError(f"cannot write to the run folder {run_folder}, {error}: choose another") from error
    try:
        yield path
    finally:
        path.unlink(missing_ok=True)


def meet(hosts: Sequence[Host], environment: Path) -> tuple[str, int]:
    """Ask all hosts whether they can take part. Returns the address of the first, and a free port there.

    Raises:
        RefusedError: one cannot.
    """
    with ThreadPoolExecutor(64) as executor:
        facts = list(executor.map(lambda host: _facts(host, environment), hosts))
    here = _read_facts(subprocess.run([sys.executable, "-c", FACTS], capture_output=True, text=True).stdout)
    for host, (installed, *_) in zip(hosts, facts, strict=True):
        if here is None or installed != here[0]:
            own = "nothing of agsel" if here is None else here[0]
            raise RefusedError(f"host {host.name} has {installed}, and this one {own}: install the same on all hosts")
    _, addresses, port = facts[0]
    address = os.environ.get("MASTER_ADDR") or next(iter(addresses), None)
    if address is None:
        raise RefusedError(f"`hostname -I` on {hosts[0].name} knows no address: set MASTER_ADDR to one of it")
    return address, port


def _facts(host: Host, environment: Path) -> list:
    script, python = quote(str(environment)), sys.executable
    answer = host.run(
        f"for i in 1 2 3 4 5 6; do [ -r {script} ] && break; sleep 1; done; "
        f"if [ ! -r {script} ]; then echo agsel: folder; elif ! source {script}; then echo agsel: shell; "
        f"elif ! cd {os.getcwd()}; then echo agsel: current; elif [ ! -x {python} ]; then echo agsel: python; "
        f"elif [ ! -r {TRAIN} ]; then echo agsel: train; else {python} -c {quote(FACTS)} || echo agsel: packages; fi",
        PATIENCE_AT_START,
    )
    facts = _read_facts(answer.stdout)
    if facts is not None:
        return facts
    said = (answer.stderr or answer.stdout).strip().splitlines()
    reasons = {
        "folder": f"does not see {environment.parent}: choose a run folder that all hosts share",
        "shell": "has a login shell that is not bash, as DeepSpeed needs it: change it (chsh)",
        "current": f"does not see the current folder {os.getcwd()}: start from one that all hosts share",
        "python": f"has no {python}: install the same Python and packages at the same place on all hosts",
        "train": f"does not see {TRAIN}: agsel must be at the same place on all hosts",
        "packages": f"lacks packages of agsel ({said[-1] if said else ''}): install the same on all hosts",
    }
    reason = next((reasons[word] for word in re.findall(r"^agsel: (\w+)$", answer.stdout, re.M)), None)
    if reason is None:
        said_by_ssh = said[-1] if said else f"exit code {answer.returncode}"
        reason = f"cannot be reached by ssh ({said_by_ssh}): `ssh {host.name} true` must work without a question"
    raise RefusedError(f"host {host.name} {reason}")


def _read_facts(output: str) -> list | None:
    """What `FACTS` printed, among what the start of a shell may print."""
    found = re.findall(r"^agsel: (\[.*\])$", output, re.M)
    return json.loads(found[-1]) if found else None


class Launch:
    """The `deepspeed` command, and the ranks that it has started.

    Args:
        hosts: of the ranks.
        run_folder: of the run.
        name: of this launch, in the environment of its ranks.
        command: with its arguments.
        environment: of the command.
    """

    def __init__(
        self, hosts: Sequence[Host], run_folder: Path, name: str, command: list[str], environment: Mapping[str, str]
    ) -> None:
        self._hosts, self._name = hosts, name
        self._logs = {rank: RankLog(run_folder, rank) for host in hosts for rank in host.ranks}
        # In a group of its own: DeepSpeed's command would kill the ranks of other hosts at the signal of a group.
        self._process = subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL, process_group=0)
        self._connections: dict[Host, psutil.Process] = {}
        self._failed_since: float | None = None
        self._lost: set[Host] = set()
        self._stuck: list[int] = []

    def wait(self) -> int:
        """Until all ranks have ended that can be reached. Returns 0 if all have ended well."""
        while self._process.poll() is None and not self._is_overdue():
            time.sleep(TICK)
            self._look_for_failures(self._hosts_left_by_command())
        self._end_connections_without_command()
        while living := self._living():
            if self._is_overdue():
                self._stuck = [rank for host in living for rank in host.ranks if not self._logs[rank].end]
                self._kill(living)
            time.sleep(TICK)
            self._look_for_failures(self._hosts)
        self._end_command()
        code = self._process.wait()
        if all(log.end == "0" for log in self._logs.values()):
            return 0
        self._name_the_dead()
        return code if code > 0 else 1

    def _is_overdue(self) -> bool:
        return self._failed_since is not None and time.monotonic() > self._failed_since + GRACE

    def _hosts_left_by_command(self) -> list[Host]:
        """Those whose connection was there and has ended."""
        with suppress(psutil.Error):
            for process in psutil.Process(self._process.pid).children(recursive=True):
                with suppress(psutil.Error):
                    if process.name() == "ssh":
                        words = process.cmdline()
                        # pdsh gives ssh the user of `user@host` apart
                        named = [host for host in self._hosts if host.name.rpartition("@")[2] in words]
                        self._connections |= dict.fromkeys(named, process)
        return [host for host, process in self._connections.items() if not _runs(process)]

    def _look_for_failures(self, hosts: Sequence[Host]) -> None:
        """A host whose ranks are all gone, and not well, has failed. One that does not answer may be saving."""
        if self._failed_since is None and hosts:
            gone = [host for host in hosts if any(self._logs[rank].end != "0" for rank in host.ranks)]
            if any(count == 0 for count in self._count(gone).values()):
                self._failed_since = time.monotonic()

    def _end_connections_without_command(self) -> None:
        """When pdsh was killed, its connections stay, and the ranks would not learn that nobody reads what they say."""
        if self._process.poll() is not None:
            for process in self._connections.values():
                with suppress(psutil.NoSuchProcess):
                    process.kill()

    def _end_command(self) -> None:
        with suppress(psutil.NoSuchProcess):
            command = psutil.Process(self._process.pid)
            for process in [*command.children(recursive=True), command]:
                with suppress(psutil.NoSuchProcess):
                    process.kill()

    def _living(self) -> list[Host]:
        """Hosts on which ranks run."""
        return [host for host, count in self._count(self._hosts).items() if count]

    def _count(self, hosts: Sequence[Host]) -> dict[Host, int | None]:
        """Ranks that run on each host; None if it does not answer."""
        counts = {}
        for host, answer in zip(hosts, self._on_all(hosts, "wc -l"), strict=True):
            counts[host] = int(answer.stdout) if answer.returncode == 0 and answer.stdout.strip().isdigit() else None
        self._lost = self._lost - {*hosts} | {host for host, count in counts.items() if count is None}
        return counts

    def _kill(self, hosts: Sequence[Host]) -> None:
        self._on_all(hosts, "cut -d / -f 3 | xargs -r kill -9")

    def _on_all(self, hosts: Sequence[Host], what: str) -> list[subprocess.CompletedProcess[str]]:
        """Give the environments in /proc of the ranks of this launch to a command, on each host."""

        def listed(host: Host) -> str:
            of_host = f"grep -lsz '^CROSS_RANK={host.place}$' /proc/[0-9]*/environ"  # DeepSpeed's number of a host
            return f"grep -lsz '^{LAUNCH}={self._name}$' $({of_host}) /dev/null | {what}"

        with ThreadPoolExecutor(64) as executor:
            return list(executor.map(lambda host: host.run(listed(host), PATIENCE), hosts))

    def _name_the_dead(self) -> None:
        """The ranks that ended without a word; those that were told to end are not to blame."""
        for host in self._lost:
            say(f"host {host.name} does not answer")
        if not any(log.began for log in self._logs.values()):
            return  # refused, in a line of its own
        dead = {r: log for r, log in self._logs.items() if not log.end and not log.was_asked}
        freed = [rank for rank in dead if rank in self._stuck]
        if freed != [*dead]:  # who waited for the dead is not to blame
            dead = {rank: log for rank, log in dead.items() if rank not in freed}
        for rank in [*dead][:LISTED]:
            name = next(host.name for host in self._hosts if rank in host.ranks)
            state = "stood still" if rank in freed else "was killed, or its host is gone"
            say(f"{dead[rank].began or f'rank {rank}, host {name}'}: it {state}; see {dead[rank].path}")
        if len(dead) > LISTED:
            say(f"... and {len(dead) - LISTED} more ranks")


class RankLog:
    """What a rank of this launch has written to its log."""

    def __init__(self, run_folder: Path, rank: int) -> None:
        self.path = run_folder / "logs" / f"rank-{rank}.log"
        self._start = 0
        with suppress(OSError), self.path.open("rb") as file:  # opening makes network file systems ask the server
            self._start = file.seek(0, os.SEEK_END)

    @property
    def began(self) -> str:
        """Rank, host and process, as its first line tells."""
        return self._after(rf"^{BEGAN} \S+, (.*)$")

    @property
    def end(self) -> str:
        """Its exit code, as its last line tells."""
        return self._after(rf"^{ENDED} \S+, exit code (.*)$")

    @property
    def was_asked(self) -> bool:
        """Whether it was told to end."""
        return bool(self._after(rf"^({ASKED})"))

    def _after(self, pattern: str) -> str:
        with suppress(OSError), self.path.open(errors="replace") as file:
            file.seek(self._start)
            found = re.search(pattern, file.read(), re.M)
            return found[1] if found else ""
        return ""


def _runs(process: psutil.Process) -> bool:
    with suppress(psutil.NoSuchProcess):
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    return False


def say(text: str) -> None:
    """Print one line."""
    sys.stdout.write(f"train.sh  {text}\n")
    sys.stdout.flush()


def train(hostfile: Path, run_folder: Path, settings: Sequence[str]) -> int:
    """Train on the hosts, to the end. Returns the exit code.

    Raises:
        RefusedError: that cannot work.
    """
    require_tools()
    require_deepspeed_env()
    hosts, launch = read_hostfile(hostfile), uuid.uuid4().hex
    with environment_file(run_folder, launch) as environment:
        address, port = meet(hosts, environment)
        command = [sys.executable, "-m", "deepspeed.launcher.runner", "--hostfile", str(hostfile), "--force_multi"]
        command += ["--no_ssh_check", "--master_addr", address]
        command += ["--master_port", os.environ.get("MASTER_PORT", str(port)), "--venv_script", quote(str(environment))]
        own = {name: value for name, value in os.environ.items() if not name.startswith(PUT_INTO_COMMANDS[1:])}
        own["PDSH_SSH_ARGS_APPEND"] = " ".join(ssh_arguments())
        return Launch(hosts, run_folder, launch, [*command, str(TRAIN), *map(quote, settings)], own).wait()


def main(arguments: Sequence[str]) -> int:
    """Train as the command line says."""
    if len(arguments) < 2:
        sys.stderr.write("agsel: error: several hosts start by `bash launch/train.sh --hostfile HOSTS RUN_FOLDER`\n")
        return REFUSED
    hostfile, run_folder, *settings = arguments
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
        signal.signal(number, lambda *_: Path(run_folder, "STOP").touch())
    try:
        return train(Path(hostfile), Path(run_folder), settings)
    except RefusedError as error:
        sys.stderr.write(f"agsel: error: {' '.join(str(error).split())}\n")
        return REFUSED


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
