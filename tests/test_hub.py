"""`--push_to_hub`: refused before a run where it could not work, and what reaches the hub at its end."""

from __future__ import annotations

import base64
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub import constants
from safetensors.torch import load
from trl import SFTConfig

from agsel.errors import RunError, UserError, one_line
from agsel.training import hub
from agsel.training.hub import push_model, require_hub
from tests.distributed import launch
from tests.tiny_run import TRAIN, save_model, save_rows, settings


def training(**changed: Any) -> SFTConfig:
    return SFTConfig(**{"output_dir": "run", "use_cpu": True, "bf16": False, "report_to": "none"} | changed)


class Hub(BaseHTTPRequestHandler):
    """Knows two tokens, one of which may write, and keeps what is uploaded, but for the user `full`."""

    protocol_version = "HTTP/1.1"
    uploaded: dict[str, dict[str, bytes]]

    def do_GET(self) -> None:
        role = {"Bearer writes": "write", "Bearer reads": "read"}.get(self.headers["authorization"])
        known = {"name": "someone", "auth": {"accessToken": {"role": role}}}
        self._answer(known, 200 if role and self.path == "/api/whoami-v2" else 401)

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["content-length"]))
        name = "/".join(self.path.split("/")[3:5])
        if self.path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked.get('organization') or 'someone'}/{asked['name']}"
            self.uploaded.setdefault(name, {})
            self._answer(
                {"url": f"http://{self.headers['host']}/{name}"}, 403 if asked.get("organization") == "other" else 200
            )
        elif "/preupload/" in self.path:
            files = [{"path": f["path"], "uploadMode": "regular"} for f in json.loads(body)["files"]]
            self._answer({"files": [{**file, "shouldIgnore": False} for file in files]})
        elif "/commit/" in self.path:
            lines = [json.loads(line)["value"] for line in body.splitlines()]
            files = {line["path"]: base64.b64decode(line["content"]) for line in lines if "path" in line}
            self.uploaded[name] |= files
            commit = {"commitUrl": f"http://{self.headers['host']}/{name}/commit/1", "commitOid": "1"}
            self._answer(commit, 507 if name.startswith("full/") else 200)
        else:
            self._answer({})

    def _answer(self, content: dict[str, Any], code: int = 200) -> None:
        text = json.dumps(content).encode()
        self.send_response(code)
        self.send_header("content-length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def address() -> Iterator[str]:
    Hub.uploaded = {}
    with ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.fixture
def online(monkeypatch: pytest.MonkeyPatch, address: str) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", address)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)


@pytest.mark.usefixtures("online")
def test_a_token_that_may_write_is_accepted() -> None:
    require_hub(training(push_to_hub=True, hub_token="writes"))


@pytest.mark.usefixtures("online")
@pytest.mark.parametrize(
    ("token", "words"),
    [
        ("reads", "needs a token that may write"),
        ("unknown", "does not know the token"),
        (None, "needs a token: `hf au"),
    ],
)
def test_a_token_that_may_not_push_is_refused(monkeypatch: pytest.MonkeyPatch, token: str | None, words: str) -> None:
    monkeypatch.setattr(hub, "get_token", lambda: token)
    with pytest.raises(UserError) as refusal:
        require_hub(training(push_to_hub=True))
    assert words in one_line(refusal)
    assert "leave out --push_to_hub" in str(refusal.value)


def test_a_hub_that_does_not_answer_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:1")
    with pytest.raises(UserError, match=r"^--push_to_hub: no answer from http://127\.0\.0\.1:1/api/whoami-v2"):
        require_hub(training(push_to_hub=True, hub_token="writes"))


def test_nothing_is_asked_of_the_hub_without_need(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    require_hub(training())
    with pytest.raises(UserError, match=r"^--push_to_hub cannot work offline: unset HF_HUB_OFFLINE"):
        require_hub(training(push_to_hub=True))
    assert huggingface_hub.is_offline_mode()


@pytest.mark.usefixtures("online")
def test_a_repository_that_may_not_be_written_is_refused() -> None:
    with pytest.raises(UserError, match=r"^--push_to_hub: no repository 'other/model' for this token, .*403"):
        require_hub(training(push_to_hub=True, hub_token="writes", hub_model_id="other/model"))
    with pytest.raises(UserError, match=r"^--push_to_hub: no repository 'a b' for this token"):
        require_hub(training(push_to_hub=True, hub_token="writes", hub_model_id="a b"))


def test_checkpoints_are_not_pushed() -> None:
    with pytest.raises(UserError, match=r"^--hub_strategy all_checkpoints: the trained model is pushed, at the end"):
        require_hub(training(push_to_hub=True, hub_strategy="all_checkpoints"))


@pytest.mark.usefixtures("online")
def test_a_push_that_fails_says_where_the_model_is(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(RunError) as failure:
        push_model(training(hub_token="writes", hub_model_id="full/model"), tmp_path)
    said = str(failure.value)
    assert said.startswith(f"the trained model is in {tmp_path}, but could not be pushed to full/model")
    assert said.endswith(f"hf upload full/model {tmp_path} .")


def test_a_run_pushes_its_model_and_nothing_else(address: str, tmp_path: Path) -> None:
    model, rows, run = save_model(tmp_path / "model"), save_rows(tmp_path / "rows.jsonl"), tmp_path / "trained"
    changed = {"push_to_hub": True, "max_steps": 2, "save_strategy": "steps", "save_steps": 1}
    outcome = launch(
        TRAIN,
        *settings(model, rows, run, **changed),
        ranks=1,
        env={"HF_ENDPOINT": address, "HF_TOKEN": "writes", "HF_HUB_OFFLINE": "0"},
    )
    assert outcome.returncode == 0, outcome.stdout
    assert outcome.stdout.count("pushed    ") == 1
    files = Hub.uploaded.pop("someone/trained")
    assert not Hub.uploaded
    assert files.keys() == {str(path.relative_to(run / "model")) for path in (run / "model").rglob("*")}
    assert {"README.md", "config.json", "tokenizer.json", "model.safetensors"} <= files.keys()
    assert "model.norm.weight" in load(files["model.safetensors"])
    assert not [*run.glob("*.safetensors")]
