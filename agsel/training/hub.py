"""Whether the model hub takes what a run is to push there, asked before anything is loaded."""

from __future__ import annotations

import json
from typing import Any
from urllib.error import HTTPError
from urllib.request import Request, urlopen

from huggingface_hub import constants, get_token
from trl import SFTConfig

from agsel.errors import UserError, one_line

PATIENCE = 10.0
"""Seconds."""
LEAVE_OUT = "or leave out --push_to_hub: model/ in the run folder can be uploaded later"


def require_hub(training: SFTConfig) -> None:
    """Refuse `--push_to_hub` without a token that may write, or without a hub that answers.

    Raises:
        UserError: says which.
    """
    if not training.push_to_hub:
        return
    if constants.is_offline_mode():
        raise UserError(f"--push_to_hub cannot work offline: unset HF_HUB_OFFLINE, {LEAVE_OUT}")
    token = training.hub_token or get_token()
    if token is None:
        raise UserError(f"--push_to_hub needs a token: `hf auth login`, HF_TOKEN or --hub_token, {LEAVE_OUT}")
    if _who_is(token).get("auth", {}).get("accessToken", {}).get("role") == "read":
        raise UserError(f"--push_to_hub needs a token that may write, this one may read: make another, {LEAVE_OUT}")


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
