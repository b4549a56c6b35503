"""Does a Prefect API answer at an address? Past every proxy on loopback; without Prefect, whose import takes a second."""

import http.client
import json
import urllib.error
import urllib.request
from urllib.parse import urlsplit

LOOPBACK = ("127.0.0.1", "localhost", "::1")
ANSWER_S = 5.0


def healthy(url: str) -> bool:
    """Whether a Prefect API answers at this address."""
    return health(url) == 200


def health(url: str) -> int | None:
    """The status of its `/health`, 404 where the answer is no JSON; None where nobody answers."""
    try:
        # Another host may be behind the user's proxy.
        direct = [urllib.request.ProxyHandler({})] if urlsplit(url).hostname in LOOPBACK else []
        with urllib.request.build_opener(*direct).open(f"{url.rstrip('/')}/health", timeout=ANSWER_S) as answer:
            json.loads(answer.read(1 << 16))
            return int(answer.status)
    except urllib.error.HTTPError as error:
        return error.code
    except (OSError, http.client.HTTPException):
        return None
    except ValueError:
        return 404
