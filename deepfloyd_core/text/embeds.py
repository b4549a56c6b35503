"""Text embeds: every text through T5 once, all 77 rows of it, in Arrow files that are mapped straight into torch.

`captions.arrow` says for every caption in which file and row its text is; captions that are cleaned to the same text
share a row. Files are made in `embed_job`, laid out as `embed_files` says.
"""

from collections.abc import Iterable
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from deepfloyd_core.arrow import mapped_table
from deepfloyd_core.config.run import Run
from deepfloyd_core.errors import ArtifactError
from deepfloyd_core.files import canonical_json, sha256_bytes
from deepfloyd_core.hashing import caption_id
from deepfloyd_core.models.identity import model_fingerprint
from deepfloyd_core.store.artifacts import Artifact, Request, newest
from deepfloyd_core.text.embed_file import EmbedFile
from deepfloyd_core.types import Identity

if TYPE_CHECKING:
    import torch

FORMAT = 4
FILES, CAPTIONS_FILE, TOKENS_SHEET = "embeds-*.arrow", "captions.arrow", "tokens.png"
_WHICH, _STORED = ("captions", "captions_sha256"), ("compression", "file_mib")  # keys of the spec
CAPTIONS = pa.schema([("key", pa.uint64()), ("file", pa.int32()), ("place", pa.int32())])  # key: the caption_id


def run_captions(run: Run, captions: Iterable[str]) -> list[str]:
    """Every text that training and sampling will ask for, once, sorted: captions, prompts, negatives, the empty one."""
    return sorted({*captions, *run.config.prompts, run.config.validation_negative_prompt, ""})


def embeds_request(run: Run, captions: list[str], encoder: Path) -> Request:
    """Identity of the embeds: the texts, how they are cleaned and stored, the encoder and tokenizer, dtype and length."""
    spec = {
        "captions": len(captions),
        "captions_sha256": sha256_bytes(canonical_json(captions).encode()),
        "cleaner": f"diffusers {metadata.version('diffusers')}, ftfy {metadata.version('ftfy')}",
        "dtype": run.config.text_encoder_dtype,
        "tokenizer_max_length": run.config.tokenizer_max_length,
        "compression": run.config.embed_compression,
        "file_mib": run.config.embed_file_mib,
    }
    if run.config.text_encoder_quantization != "none":
        spec["quantization"] = run.config.text_encoder_quantization
    return Request("text_embeds", FORMAT, spec, {"encoder": model_fingerprint(encoder, ("text_encoder", "tokenizer"))})


def older_embeds(workspace: Path, request: Request) -> Artifact | None:
    """The newest embeds that differ from the wanted ones in their captions alone, to take rows over from."""

    def same(record: dict[str, Any]) -> bool:
        found, wanted = (_without(spec, _WHICH) for spec in (record["spec"], request.spec))
        return (found, record["inputs"]) == (wanted, request.inputs) and record["fingerprint"] != request.fingerprint

    return newest(workspace, "text_embeds", FORMAT, same)


def rows_identity(embeds: Identity) -> dict[str, Any]:
    """What decides the rows of a caption: how it is cleaned and encoded; not which others there are, nor the files."""
    return {**_without(embeds.spec, _WHICH + _STORED), **embeds.inputs}


def _without(spec: dict[str, Any], keys: tuple[str, ...]) -> dict[str, Any]:
    return {key: value for key, value in spec.items() if key not in keys}


def truncated_texts(embeds: Artifact, most: int) -> list[tuple[str, int]]:
    """The texts that lost most tokens at their end, and how many each lost."""
    lost: list[tuple[str, int]] = []
    length = int(embeds.summary["length"])
    for path in sorted(embeds.path.glob(FILES)):
        file = EmbedFile(path)
        over = file.tokens - length
        if (over > 0).any():
            texts = file.texts
            lost += [(texts[place], int(over[place])) for place in np.flatnonzero(over > 0)]
            lost = sorted(lost, key=lambda row: (-row[1], row[0]))[:most]
    return lost


class Embeds:
    """Random access to stored embeds: `embeds[caption_id]` is a (T, D) tensor; unpacked, it shares the file's pages."""

    def __init__(self, artifact: Artifact) -> None:
        table = mapped_table(artifact.path / CAPTIONS_FILE)
        self._keys, self._file, self._place = (table[name].to_numpy() for name in CAPTIONS.names)
        self._files = [EmbedFile(path) for path in sorted(artifact.path.glob(FILES))]

    def __getitem__(self, name: str) -> "torch.Tensor":
        key = np.uint64(int(name, 16))
        spot = int(np.searchsorted(self._keys, key))
        if spot == len(self._keys) or self._keys[spot] != key:
            raise ArtifactError(f"The text embeds lack caption {name}. Run `deepfloyd verify` on the workspace.")
        return self._files[int(self._file[spot])].row(int(self._place[spot]))

    def of(self, caption: str) -> "torch.Tensor":
        """The rows of a caption given as text."""
        return self[caption_id(caption)]

    def ids(self) -> list[str]:
        """The `caption_id` of every caption, sorted."""
        return [f"{key:016x}" for key in self._keys.tolist()]
