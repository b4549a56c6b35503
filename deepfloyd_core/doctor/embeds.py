"""How much room the text embeds of a run take at most: most of what a workspace holds, and known before anything is made.

One row for each caption, of 77 tokens and T5's width: 630 kB in bf16. Captions that are equal share a row, so the count of
pictures is an upper bound. Only folders on this machine are counted, for a third of a second.
"""

from contextlib import suppress
from time import monotonic

from deepfloyd_core.config.run import Run
from deepfloyd_core.config.source_keys import SOURCE_TYPES
from deepfloyd_core.doctor.places import Coming
from deepfloyd_core.errors import DeepFloydError
from deepfloyd_core.files import parsed_json
from deepfloyd_core.models.folders import folder_here
from deepfloyd_core.models.text_encoders import text_encoder_of
from deepfloyd_core.sources.source import open_source
from deepfloyd_core.store.counts import many

_PATIENCE_S = 0.3
_WIDTH = {"fp32": 4, "bf16": 2}  # bytes of a value
_KIND = "text_embeds"


def embeds_coming(run: Run) -> Coming | None:
    """The embeds of a run that has none yet; None: it has some, which are reused, or no pictures in folders."""
    count = 0 if has_embeds(run) else _count_pictures(run)
    if not count:
        return None
    row = run.config.tokenizer_max_length * _columns(run) * _WIDTH[run.config.text_encoder_dtype]
    return Coming(f"embeds of {many(count, 'caption')}", count * row, is_certain=False)


def has_embeds(run: Run) -> bool:
    """Whether captions were encoded in the workspace before: a run of the same captions needs no T5."""
    return any((run.workspace / _KIND).glob("*/manifest.json"))


def _count_pictures(run: Run) -> int:
    """Files that may be pictures; after _PATIENCE_S those so far."""
    count, end = 0, monotonic() + _PATIENCE_S
    for dataset in run.datasets:
        if not SOURCE_TYPES[dataset.type].is_folder:
            continue
        with suppress(DeepFloydError, OSError):  # told by the check of the run file
            for file in open_source(dataset).listing():
                count += file.kind in ("picture", "unsure")
                if monotonic() > end:
                    return count
    return count


def _columns(run: Run) -> int:
    """Values of a token: the width of the text encoder."""
    stage = run.config.first_stage
    encoder = text_encoder_of(stage)
    with suppress(DeepFloydError, OSError, ValueError, KeyError):
        if folder := folder_here(run.config.stage(stage).model, stage, text=True):
            return int(parsed_json((folder / encoder.weights_folder / "config.json").read_bytes())["d_model"])
    return int(encoder.random_config["d_model"])
