"""Keys of pages in the UI, which has a history for each."""

import re
from pathlib import Path

from deepfloyd_core.files import sha256_bytes


def workspace_key(page: str, workspace: Path) -> str:
    """The key of a page: one for each workspace, so that the UI's history of it has the versions of one model.

    Prefect allows lower-case letters, digits and dashes; a name with other characters gets some digits of its hash.
    """
    name = workspace.absolute().name
    plain = re.sub("[^a-z0-9]+", "-", name.lower()).strip("-")
    parts = [page, plain, *([] if plain == name else [sha256_bytes(name.encode())[:6]])]
    return "-".join(filter(None, parts))
