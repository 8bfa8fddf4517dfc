"""Network namespaces of this machine as hosts: each with a name, an address, sshd, and a /dev/shm of its own.

They share processes, files and users: what a host must not see is hidden by `hide`.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

import pytest

from tests.distributed import REPOSITORY, environment

REQUIRED = "AGSEL_TEST_CLUSTER"
"""Variable that makes failures of what would be skipped, `required` for a machine on which all is there."""
SYSTEM_PATH = "/usr/local/sbin:/usr/sbin:/sbin"
"""Daemons are there, whoever the user is."""
HOLDER = """
ip link set lo up
hostname "$0" && mount --bind "$1/hosts" /etc/hosts && mount --bind "$1/ssh_config" /etc/ssh/ssh_config &&
  mount -t tmpfs tmpfs /dev/shm && mkdir -p /run/sshd && echo ready && exec cat
"""
"""Keeps the namespaces of a host, named `$0`, until its input ends."""
SSH_CONFIG = """
Host *
  User root
  IdentityFile {folder}/key
  UserKnownHostsFile {folder}/known_hosts
  StrictHostKeyChecking no
  LogLevel ERROR
"""
SSHD_CONFIG = """
HostKey {folder}/{name}.key
AuthorizedKeysFile {folder}/key.pub
PidFile none
PermitRootLogin yes
StrictModes no
UsePAM no
"""


def unavailable(reason: str) -> NoReturn:
    """Skip the test, or fail it where everything must be there."""
    if os.environ.get(REQUIRED) == "required":
        pytest.fail(reason)
    pytest.skip(reason)


def require(*programs: str) -> None:
    """Skip the test if it cannot be run here: it needs root and these programs."""
    if os.getuid() != 0:
        unavailable("needs root")
    missing = [name for name in programs if find(name) is None]
    if missing:
        unavailable(f"needs {', '.join(missing)}: `bash tools/cluster_test.sh` installs them")


def find(program: str) -> str | None:
    """Its path."""
    return shutil.which(program, path=f"{environment()['PATH']}:{SYSTEM_PATH}")


class Hosts:
    """Hosts on one bridge.

    Attributes:
        folder: seen by all of them; is removed at the end.
        addresses: by name.
    """

    def __init__(self, folder: Path, names: Sequence[str]) -> None:
        self.folder = folder
        self._prefix = f"agsel{os.getpid()}-{folder.name[-4:]}"
        # Nothing of one test reaches another: this network is in namespaces of its own, the bridge in one too.
        self.addresses = {name: f"10.77.0.{place}" for place, name in enumerate(names, 11)}
        self._holders: dict[str, subprocess.Popen[str]] = {}

    def start(
        self, host: str, command: Sequence[object], env: dict[str, str] | None = None, **options: Any
    ) -> subprocess.Popen[Any]:
        """Start a command on a host, in a session of its own; its process is the command itself.

        Args:
            host: its name.
            command: with its arguments.
            env: changes to the environment of runs.
            options: of `Popen`; without `cwd` it is the repository.
        """
        changes = {"PATH": f"{environment()['PATH']}:{SYSTEM_PATH}"} | (env or {})
        folder = options.pop("cwd", REPOSITORY)
        enter = ["nsenter", "--target", self._holders[host].pid, "--net", "--uts", "--mount", "--"]
        words = [*enter, "bash", "-c", 'cd "$0" && exec "$@"', folder, *command]
        return subprocess.Popen(
            list(map(str, words)), env=environment() | changes, **({"start_new_session": True} | options)
        )

    def run(self, host: str, command: Sequence[object], **options: Any) -> str:
        """Run a command that must succeed on a host. Returns what it printed."""
        process = self.start(host, command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **options)
        output, _ = process.communicate()
        assert process.returncode == 0, f"{command} on {host}: {output}"
        return output

    def cut_link(self, host: str) -> None:
        """Nothing reaches the host or leaves it, and nobody is told."""
        self._set_link(host, "down")

    def mend_link(self, host: str) -> None:
        """Undo `cut_link`."""
        self._set_link(host, "up")

    def hide(self, host: str, folder: Path) -> None:
        """Put an empty folder, which only this host sees, in the place of another."""
        self.run(host, ["mount", "-t", "tmpfs", "tmpfs", folder])

    def kill_host(self, host: str) -> None:
        """As if its power was cut: it ends without a word, and does not come back."""
        self.cut_link(host)
        self._kill(host)

    def processes(self, host: str) -> list[int]:
        """Of the host, without the one that keeps it."""
        listed = _ip("netns", "pids", self._space(host)).split()
        return [int(pid) for pid in listed if int(pid) != self._holders[host].pid]

    def set_up(self) -> None:
        """Make them."""
        known = "".join(f"{address} {name}\n" for name, address in self.addresses.items())
        (self.folder / "hosts").write_text(f"127.0.0.1 localhost\n{known}")
        (self.folder / "ssh_config").write_text(SSH_CONFIG.format(folder=self.folder))
        self._make_key("key")
        _ip("netns", "add", self._space("bridge"))
        _ip("-n", self._space("bridge"), "link", "add", "bridge", "type", "bridge")
        _ip("-n", self._space("bridge"), "link", "set", "bridge", "up")
        for name, address in self.addresses.items():
            self._set_up_host(name, address)

    def tear_down(self) -> None:
        """End all that runs on them, and remove them."""
        for name in self.addresses:
            self._kill(name)
        for name in ("bridge", *self.addresses):
            subprocess.run(["ip", "netns", "delete", self._space(name)], capture_output=True)

    def _set_up_host(self, name: str, address: str) -> None:
        space, bridge = self._space(name), self._space("bridge")
        _ip("netns", "add", space)
        _ip("-n", bridge, "link", "add", name, "type", "veth", "peer", "name", "eth0", "netns", space)
        _ip("-n", bridge, "link", "set", name, "master", "bridge", "up")
        _ip("-n", space, "address", "add", f"{address}/24", "dev", "eth0")
        _ip("-n", space, "link", "set", "eth0", "up")
        self._holders[name] = self._hold(name)
        self._make_key(f"{name}.key")
        (self.folder / f"{name}.sshd").write_text(SSHD_CONFIG.format(folder=self.folder, name=name))
        log = self.folder / f"{name}.sshd.log"
        self.start(name, [find("sshd"), "-D", "-E", log, "-f", self.folder / f"{name}.sshd"], cwd="/")
        self.run(name, ["bash", "-c", "until (: < /dev/tcp/localhost/22); do sleep 0.02; done 2> /dev/null"])

    def _hold(self, name: str) -> subprocess.Popen[str]:
        enter = ["nsenter", f"--net=/run/netns/{self._space(name)}", "unshare", "--uts", "--mount", "--"]
        holder = subprocess.Popen(
            [*enter, "bash", "-c", HOLDER, name, str(self.folder)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        assert holder.stdout is not None
        assert holder.stderr is not None
        if holder.stdout.readline() != "ready\n":
            unavailable(f"namespaces cannot be made here: {holder.stderr.read()}")
        return holder

    def _kill(self, host: str) -> None:
        until = time.monotonic() + 10
        while pids := _processes_in(self._space(host)):
            assert time.monotonic() < until, f"processes of {host} cannot be killed: {pids}"
            for pid in pids:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.05)
        if host in self._holders:
            self._holders[host].communicate()

    def _set_link(self, host: str, state: str) -> None:
        _ip("-n", self._space("bridge"), "link", "set", host, state)

    def _space(self, name: str) -> str:
        return f"{self._prefix}-{name}"

    def _make_key(self, name: str) -> None:
        command = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(self.folder / name)]
        subprocess.run(command, check=True)


@contextlib.contextmanager
def hosts(number: int, *more: str) -> Iterator[Hosts]:
    """The hosts `n1`, `n2`, ... and others, which know each other by name and may use ssh without a question.

    Args:
        number: of them.
        more: names of others.
    """
    require("ip", "nsenter", "unshare", "sshd", "ssh", "ssh-keygen")
    with tempfile.TemporaryDirectory(prefix="agsel-hosts-") as folder:
        made = Hosts(Path(folder), [*(f"n{place}" for place in range(1, number + 1)), *more])
        try:
            made.set_up()
            yield made
        finally:
            made.tear_down()


def _processes_in(space: str) -> list[int]:
    listed = subprocess.run(["ip", "netns", "pids", space], capture_output=True, text=True)
    return [int(pid) for pid in listed.stdout.split()]


def _ip(*words: str) -> str:
    """Run `ip`; the first command that is refused skips the test."""
    done = subprocess.run(["ip", *words], capture_output=True, text=True)
    if done.returncode != 0:
        unavailable(f"network namespaces cannot be made here: ip {' '.join(words)}: {done.stderr.strip()}")
    return done.stdout
