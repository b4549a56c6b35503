"""Downloads of pictures: one URL into one file, within limits of place, time and size.

Whoever wrote the table of URLs, and each server behind it, may be hostile. So a body is inflated and written piece by
piece, each layer of its encoding within the limits; cookies are ignored; and an address that is not public is refused
where it is connected to, after redirects and names were followed: no second look-up can give another one.
"""

import ipaddress
import time
import zlib
from collections.abc import Iterator, Mapping
from http.cookiejar import CookieJar
from pathlib import Path
from typing import Any

import httpx

from deepfloyd_core.files import atomic_path
from deepfloyd_core.store.file_faults import written

TRIES = 3
TIMEOUT = httpx.Timeout(20.0, connect=10.0)  # seconds without a byte
WHOLE_S = 120.0
MAX_BYTES = 256 << 20  # of the body as it is sent, and after each layer of its encoding
AT_ONCE = 32
_PIECE = 1 << 16  # bytes that are inflated at once
_AGAIN = (408, 429, 500, 502, 503, 504)  # statuses that may heal
_LONGEST_WAIT_S = 30.0
_INFLATES = {"gzip": zlib.MAX_WBITS | 16, "x-gzip": zlib.MAX_WBITS | 16, "deflate": zlib.MAX_WBITS}  # window bits
_MOST_LAYERS = 4  # of Content-Encoding


class _LostError(Exception):
    """Why a try gave no picture. wait_s: how long to wait before the next try; None: another one would not help."""

    def __init__(self, why: str, wait_s: float | None = None) -> None:
        super().__init__(why)
        self.wait_s = wait_s


class _NoCookies(CookieJar):
    def extract_cookies(self, response: Any, request: Any) -> None:
        """Keep none: what one server sets must not reach, nor harm, a request to the next."""


def download_client(agent: str, private: bool) -> httpx.Client:
    """What `download` asks with. agent: its User-Agent; private: also loopback, link-local and private addresses."""
    return httpx.Client(
        headers={"User-Agent": agent, "Accept-Encoding": "gzip, deflate"}, follow_redirects=True, timeout=TIMEOUT,
        limits=httpx.Limits(max_connections=AT_ONCE), cookies=_NoCookies(),
        event_hooks={"request": [] if private else [_only_public]},
    )  # fmt: skip


def download(client: httpx.Client, url: str, file: Path) -> None:
    """Download a URL into a file, which appears whole or not at all. Raises OSError that names the URL, and StorageError
    where the disk does not take it: that is no fault of the picture.
    """
    for attempt in range(1, TRIES + 1):
        try:
            _try(client, url, file, 0.5 * 2**attempt)
        except _LostError as lost:
            if lost.wait_s is None or attempt == TRIES:
                raise OSError(f"{url}: {lost}") from lost
            time.sleep(lost.wait_s)
        else:
            return


def _try(client: httpx.Client, url: str, file: Path, wait_s: float) -> None:
    try:
        with client.stream("GET", url) as answer:
            if answer.status_code != 200:
                why = f"HTTP {answer.status_code} {answer.reason_phrase}".rstrip()
                raise _LostError(why, _asked_wait_s(answer, wait_s) if answer.status_code in _AGAIN else None)
            with written(file.parent), atomic_path(file) as tmp, tmp.open("wb") as handle:
                handle.writelines(_body(answer))
    except (httpx.HTTPError, httpx.InvalidURL, ValueError, OverflowError) as failure:
        hopeless = (httpx.InvalidURL, httpx.UnsupportedProtocol, httpx.TooManyRedirects, ValueError, OverflowError)
        raise _LostError(
            str(failure) or type(failure).__name__, None if isinstance(failure, hopeless) else wait_s
        ) from failure


def _body(answer: httpx.Response) -> Iterator[bytes]:
    encodings = [name.strip().lower() for name in answer.headers.get("content-encoding", "").split(",")]
    layers = [name for name in encodings if name not in ("", "identity")]
    if len(layers) > _MOST_LAYERS or not _INFLATES.keys() >= set(layers):
        raise _LostError("its Content-Encoding is none that was asked for (gzip, deflate)")
    end = time.monotonic() + WHOLE_S
    pieces = _limited(answer.iter_raw(), end)
    for name in reversed(layers):
        pieces = _limited(_inflated(pieces, name), end)
    return pieces


def _limited(pieces: Iterator[bytes], end: float) -> Iterator[bytes]:
    size = 0
    for piece in pieces:
        size += len(piece)
        if size > MAX_BYTES:
            raise _LostError(f"more than {MAX_BYTES >> 20} MiB")
        if time.monotonic() > end:
            raise _LostError(f"not done after {WHOLE_S:g} s")
        yield piece


def _inflated(pieces: Iterator[bytes], encoding: str) -> Iterator[bytes]:
    """At most _PIECE bytes at a time, whatever a piece inflates to."""
    inflater, is_first = zlib.decompressobj(_INFLATES[encoding]), True
    for piece in pieces:
        if is_first and encoding == "deflate" and not _has_zlib_header(piece):
            inflater = zlib.decompressobj(-zlib.MAX_WBITS)  # servers send both kinds
        left, is_first, is_full = piece, False, False
        while (left or is_full) and not inflater.eof:
            try:
                data = inflater.decompress(left, _PIECE)
            except zlib.error as error:
                raise _LostError(f"its {encoding} body is damaged ({error})", 0.5) from error
            left, is_full = inflater.unconsumed_tail, len(data) == _PIECE
            yield data
        if inflater.eof:
            return
    if not is_first:
        raise _LostError(f"its {encoding} body is cut off", 0.5)


def _has_zlib_header(piece: bytes) -> bool:
    return len(piece) > 1 and piece[0] & 15 == 8 and int.from_bytes(piece[:2], "big") % 31 == 0


def _asked_wait_s(answer: httpx.Response, default_s: float) -> float:
    asked = answer.headers.get("retry-after", "")
    return min(float(asked), _LONGEST_WAIT_S) if asked.isascii() and asked.isdigit() else default_s


def _only_public(request: httpx.Request) -> None:
    """Refuse a request to an address that is not public. httpx calls this for each, redirects too.

    Behind a proxy only addresses are refused: names are looked up by the proxy, which has an address of the user's.
    """
    host, is_direct = request.url.raw_host.decode("ascii"), False
    _check_address(host)

    def watch(event: str, info: Mapping[str, Any]) -> None:
        nonlocal is_direct
        if event == "connection.connect_tcp.started":
            is_direct = info["host"] == host
        elif event == "connection.connect_tcp.complete" and is_direct:
            stream = info["return_value"]
            try:
                _check_address(stream.get_extra_info("server_addr")[0])
            except _LostError:
                stream.close()
                raise

    request.extensions["trace"] = watch


def _check_address(host: str) -> None:
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return  # a name
    mapped = getattr(address, "ipv4_mapped", None) or address
    if not mapped.is_global or mapped.is_multicast:
        raise _LostError(f"{address} is no public address; csv_private_addresses = true allows it")
