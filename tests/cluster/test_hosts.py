"""That namespaces are hosts: they know each other by name, can be cut off, and leave nothing."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from tests.cluster.hosts import Hosts, hosts

pytestmark = pytest.mark.cluster


def ssh_to_second(made: Hosts) -> tuple[int, str]:
    command = ["ssh", "-o", "ConnectTimeout=1", "n2", "hostname"]
    process = made.start("n1", command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    output, _ = process.communicate()
    return process.returncode, output.strip()


def test_a_host_can_be_reached_cut_off_and_killed() -> None:
    with hosts(2) as made:
        (made.folder / "seen").mkdir()
        made.hide("n2", made.folder / "seen")
        (made.folder / "seen" / "file").touch()
        assert made.run("n2", ["ls", made.folder / "seen"]) == ""
        assert ssh_to_second(made) == (0, "n2")
        made.cut_link("n2")
        assert ssh_to_second(made)[0] == 255
        made.mend_link("n2")
        assert ssh_to_second(made) == (0, "n2")
        made.kill_host("n2")
        assert ssh_to_second(made)[0] == 255
        left = made.start("n1", ["sleep", "1000"])
    assert left.wait(1) != 0
    assert not made.folder.exists()
    assert not list(Path("/run/netns").glob(f"*-{made.folder.name[-4:]}-*"))
