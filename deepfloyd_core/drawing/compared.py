"""Comparisons: what several versions have drawn of the same prompts, sizes and seeds, below each other. No torch.

An artifact of its own, so that the comparison of other pictures overwrites none, and `gc` removes old ones.
"""

import logging
from collections.abc import Mapping, Sequence

from deepfloyd_core.config.run import Run
from deepfloyd_core.sampling.comparison import save_comparison, version_words
from deepfloyd_core.sampling.jobs import GeneratedSummary
from deepfloyd_core.sampling.pictures import SHEET, Picture, picture_scale
from deepfloyd_core.store.artifacts import Artifact, Request, WorkDir, materialise
from deepfloyd_core.store.manifest import Summary

COMPARED_FORMAT = 1
log = logging.getLogger(__name__)


def compare(run: Run, pictures: Sequence[Picture], drawn: Mapping[str, Artifact]) -> Artifact:
    """A sheet of what versions have drawn, by their names: for each prompt and size a row of each version, with the same
    seeds below each other, of the last stage.
    """
    folders = {version_words(name): one.path for name, one in drawn.items()}
    last = next(iter(drawn.values())).summary(GeneratedSummary).stages[-1]

    def build(work: WorkDir) -> Summary:
        save_comparison(pictures, folders, picture_scale(last, run.config.first_stage), work.path / SHEET)
        return Summary()

    # By their fingerprints alone: it is whole without what was drawn.
    inputs = {f"of {words}": one.fingerprint for words, one in zip(folders, drawn.values(), strict=True)}
    request = Request("compared", COMPARED_FORMAT, {"versions": list(drawn)}, inputs)
    artifact = materialise(run.workspace, request, build)
    log.info("%s, side by side: %s", " and ".join(folders), artifact.path / SHEET)
    return artifact
