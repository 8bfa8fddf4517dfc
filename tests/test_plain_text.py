"""tools/quality/plain_text.py: whole topics, the same text each time, within its length."""

import subprocess
import sys
from pathlib import Path

from tests.distributed import REPOSITORY
from tools.quality.plain_text import LARGEST, text_of


def test_topics_are_whole_and_in_order() -> None:
    long = "x" * LARGEST
    assert text_of({"b": "two", "c": long, "a": " one\n"}) == "one\n\ntwo\n\n"


def test_every_python_has_enough_of_it(tmp_path: Path) -> None:
    program = REPOSITORY / "tools/quality/plain_text.py"
    texts = []
    for name in ("one", "two"):
        subprocess.run([sys.executable, str(program), str(tmp_path / "data" / name)], check=True)
        texts.append((tmp_path / "data" / name).read_text(encoding="utf-8"))
    assert texts[0] == texts[1]
    assert 0.9 * LARGEST < len(texts[0]) <= LARGEST
