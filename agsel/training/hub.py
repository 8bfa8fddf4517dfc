"""The model hub: whether it takes what a run is to push there, asked before anything is loaded, and the push."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.request import Request, urlopen

from huggingface_hub import HfApi, RepoUrl, constants, get_token
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from transformers.trainer_utils import HubStrategy
from trl import SFTConfig

from agsel.errors import RunError, UserError, one_line

PATIENCE = 10.0
"""Seconds."""
LEAVE_OUT = "or leave out --push_to_hub: model/ in the run folder can be uploaded later"


def require_hub(training: SFTConfig) -> None:
    """Refuse `--push_to_hub` without a token that may write, a hub that answers or a repository that may be written.

    The repository is made, as the Trainer would do a little later.

    Raises:
        UserError: says which.
    """
    if not training.push_to_hub:
        return
    if training.hub_strategy not in (HubStrategy.END, HubStrategy.EVERY_SAVE):
        raise UserError(
            f"--hub_strategy {training.hub_strategy.value}: the trained model is pushed, at the end, and no checkpoint "
            "before; leave it out"
        )
    if constants.is_offline_mode():
        raise UserError(f"--push_to_hub cannot work offline: unset HF_HUB_OFFLINE, {LEAVE_OUT}")
    token = training.hub_token or get_token()
    if token is None:
        raise UserError(f"--push_to_hub needs a token: `hf auth login`, HF_TOKEN or --hub_token, {LEAVE_OUT}")
    if _who_is(token).get("auth", {}).get("accessToken", {}).get("role") == "read":
        raise UserError(f"--push_to_hub needs a token that may write, this one may read: make another, {LEAVE_OUT}")
    try:
        _make_repository(training)
    except (HfHubHTTPError, HFValidationError) as error:
        raise UserError(
            f"--push_to_hub: no repository {_repository_of(training)!r} for this token, {one_line(error)}: name "
            f"another (--hub_model_id), {LEAVE_OUT}"
        ) from error


def push_model(training: SFTConfig, folder: Path) -> str:
    """Upload a trained model with its card. Returns where it is.

    Args:
        training: names the repository and the branch.
        folder: of the model, which stays as it is.

    Raises:
        RunError: the hub does not take it.
    """
    try:
        repository = _make_repository(training)
        HfApi(token=training.hub_token).upload_folder(
            repo_id=repository.repo_id,
            folder_path=folder,
            revision=training.hub_revision,
            commit_message="Trained with agsel",
        )
    except Exception as error:  # of many libraries; what counts now is that the model is safe
        name = _repository_of(training)
        raise RunError(
            f"the trained model is in {folder}, but could not be pushed to {name} (--push_to_hub), {one_line(error)}: "
            f"hf upload {name} {folder} ."
        ) from error
    return str(repository)


def _make_repository(training: SFTConfig) -> RepoUrl:
    """Unless it is there."""
    api = HfApi(token=training.hub_token)
    return api.create_repo(_repository_of(training), private=training.hub_private_repo, exist_ok=True)


def _repository_of(training: SFTConfig) -> str:
    return training.hub_model_id or Path(training.output_dir).absolute().name


def _who_is(token: str) -> dict[str, Any]:
    """As `huggingface_hub.whoami`, which waits for ever."""
    address = f"{constants.ENDPOINT}/api/whoami-v2"
    try:
        with urlopen(Request(address, headers={"authorization": f"Bearer {token}"}), timeout=PATIENCE) as answer:
            return json.load(answer)
    except HTTPError as error:
        reason = "does not know the token" if error.code in (401, 403) else f"answers {error.code} {error.reason}"
        raise UserError(f"--push_to_hub: {constants.ENDPOINT} {reason}: correct it, {LEAVE_OUT}") from error
    except (OSError, ValueError) as error:
        raise UserError(
            f"--push_to_hub: no answer from {address}, {one_line(error)}: try again, {LEAVE_OUT}"
        ) from error
