"""Requests to the API of a real Prefect server of ours, with its password."""

import json
import os
import urllib.request
from base64 import b64encode
from typing import Any


def post(url: str, path: str, body: dict[str, Any], login: str | None = None) -> Any:
    """The answer to a request. url: as PREFECT_API_URL; login: user:password, by default that of the environment."""
    login = os.environ.get("PREFECT_API_AUTH_STRING", "") if login is None else login
    headers = {"Content-Type": "application/json", "Authorization": f"Basic {b64encode(login.encode()).decode()}"}
    request = urllib.request.Request(f"{url}/{path}", json.dumps(body).encode(), headers)
    with urllib.request.urlopen(request, timeout=30) as answer:
        return json.load(answer)
