"""The bucket of a workspace: whether it can be listed, read and written, and keeps the conditions of writes."""

from deepfloyd_core.config.bucket_workspace import checked_url, is_url
from deepfloyd_core.config.run import Run
from deepfloyd_core.doctor.finding import Finding, told
from deepfloyd_core.errors import DeepFloydError
from deepfloyd_core.store.bucket_turn import try_conditions
from deepfloyd_core.store.mirror import open_mirror


def bucket_findings(run: Run) -> list[Finding]:
    """None for a workspace that is a folder. Writes one small object, and removes it."""
    if not is_url(run.config.workspace):
        return []
    try:
        mirror = open_mirror(checked_url(run.config.workspace), run.workspace)
        try_conditions(mirror)
    except DeepFloydError as error:
        return [told("bucket", error)]
    text = "listing, reading, writing and conditional writes work"
    return [Finding("bucket", "fine", f"{mirror.url}: {text}; {mirror.workspace} mirrors it")]
