"""The hub: does it answer, is somebody logged in, what time is it there. No request waits for more than some seconds."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from deepfloyd_core.doctor.finding import Finding
from deepfloyd_core.doctor.network import ahead

SILENCE_S = 4.0  # after which a hub that says nothing is away
LOGIN = "hf auth login"


@dataclass(frozen=True)
class HubState:
    """What the hub answered."""

    away: str = ""  # why it did not answer; empty: it did
    ahead_s: float | None = None  # its clock minus ours; None: not known
    login: str = ""  # why its token is refused; empty: it is accepted, or there is none
    has_token: bool = False


def ask_hub() -> HubState:
    """Ask the hub for its time, and whether it knows our token. Run in `in_seconds`."""
    from httpx2 import HTTPError, InvalidURL
    from huggingface_hub import HfApi, constants, get_session, get_token, is_offline_mode
    from huggingface_hub.errors import HfHubHTTPError

    has_token = get_token() is not None
    if is_offline_mode():
        return HubState("HF_HUB_OFFLINE forbids to ask it", has_token=has_token)
    try:
        ahead_s = ahead(get_session().head(constants.ENDPOINT).headers.get("date"))
        if has_token:
            HfApi().whoami()
    except HfHubHTTPError as error:
        status = error.response.status_code
        return HubState("", ahead_s, f"{constants.ENDPOINT} refuses the token of this machine ({status})", True)
    except (HTTPError, InvalidURL, ImportError, OSError) as error:
        return HubState(
            f"{constants.ENDPOINT} cannot be reached ({error or type(error).__name__})", None, "", has_token
        )
    return HubState("", ahead_s, "", has_token)


def hub_finding(state: HubState, is_needed: bool) -> Finding:
    """Whether the hub answers and knows us. No fault: a model that must come from it, and cannot, is one of its own.

    is_needed: whether a model must come from it, as far as is known.
    """
    if state.away:
        return Finding(
            "hub", "note", f"{state.away}; {'a token is stored' if state.has_token else 'nobody is logged in'}"
        )
    if state.login:
        return Finding("hub", "note", state.login, f"{LOGIN} --force")
    if state.has_token:
        return Finding("hub", "fine", "answers, and accepts the token of this machine")
    if not is_needed:
        return Finding("hub", "fine", "answers; nobody is logged in, and no model must come from it")
    return Finding("hub", "note", "answers; nobody is logged in, which models with a licence need", LOGIN)


@contextmanager
def in_seconds() -> Iterator[None]:
    """In this block each wait of the hub's library ends after SILENCE_S; it asks for none itself in most calls."""
    from httpx2 import InvalidURL
    from huggingface_hub import get_session

    try:
        hooks = get_session().event_hooks["request"]
    except (InvalidURL, ImportError):  # of a proxy, which whoever asks is told
        hooks = []
    hooks.append(_soon)
    try:
        yield
    finally:
        hooks.remove(_soon)


def _soon(request: Any) -> None:
    request.extensions["timeout"] = dict.fromkeys(("connect", "read", "write", "pool"), SILENCE_S)
