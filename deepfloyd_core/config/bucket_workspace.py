"""A workspace in a bucket: its URL, and the folder of this machine in which its files are kept meanwhile.

All code works with that folder. It follows from the URL alone, so every command finds the same one. Credentials, region and
endpoint are none of a run file's business: the AWS libraries take them from the environment and from ~/.aws.
"""

import re
from collections.abc import Iterator
from pathlib import Path

from deepfloyd_core.config.base import home_path
from deepfloyd_core.errors import ConfigError
from deepfloyd_core.files import sha256_bytes

SCHEME = "s3://"
CACHE = "~/.cache/deepfloyd/workspaces"
_BUCKET = re.compile(r"[a-z0-9][a-z0-9.\-]{1,61}[a-z0-9]")
_UNUSUAL = re.compile(r"[^A-Za-z0-9._-]+")
_LONGEST = 60  # characters of a folder's name that tell people which workspace it is


def is_url(workspace: str) -> bool:
    """Whether a workspace is a URL, and no folder."""
    return "://" in workspace


def checked_url(workspace: str) -> str:
    """A workspace's URL in its one spelling, without a `/` at the end. Raises ConfigError for what names no prefix of a
    bucket.
    """
    rest = workspace.removeprefix(SCHEME).rstrip("/")
    bucket, _, prefix = rest.partition("/")
    if not workspace.startswith(SCHEME):
        raise ConfigError(f"workspace is {workspace!r}. It can be a folder, or s3://BUCKET/PREFIX.")
    if not _BUCKET.fullmatch(bucket):
        raise ConfigError(
            f"workspace is {workspace!r}, and {bucket!r} cannot be the name of a bucket. Use s3://BUCKET/PREFIX."
        )
    if not prefix or any(part in ("", ".", "..") for part in prefix.split("/")) or set(prefix) & set("?#*%\\\0"):
        raise ConfigError(
            f"workspace is {workspace!r}. Give it a prefix of its own in the bucket, such as s3://{bucket}/birds."
        )
    return f"{SCHEME}{rest}"


def mirror_folder(url: str, cache: str | None = None) -> Path:
    """The folder of this machine for a workspace in a bucket. cache: the folder of such folders; None: CACHE."""
    url = checked_url(url)
    name = _UNUSUAL.sub("-", url.removeprefix(SCHEME))[-_LONGEST:].strip("-.")
    return home_path(Path(cache or CACHE)) / f"{name}-{sha256_bytes(url.encode())[:8]}"


def folder_of(workspace: str, cache: str | None = None) -> Path:
    """Where a workspace is on this machine: its folder, or the one that mirrors it."""
    return mirror_folder(workspace, cache) if is_url(workspace) else Path(workspace)


def workspace_faults(workspace: str, cluster: str | None) -> Iterator[str]:
    """Why a workspace cannot be one. cluster: its address, if there is one."""
    if not is_url(workspace):
        return
    try:
        checked_url(workspace)
    except ConfigError as error:
        yield str(error).removesuffix(".")
    if cluster is not None:
        yield (
            f"task_runner_address is {cluster!r}, and workspace is in a bucket: the machines of a cluster write shards "
            "into a folder that all of them share. Remove the address, or use such a folder"
        )
