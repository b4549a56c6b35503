"""Text embeds: the hidden states of every text (all 77 tokens), computed once by T5, in Arrow files mapped into torch.

`captions.arrow` gives for every caption the file and row of its text; captions that are cleaned to the same text share
a row. `encode` makes the files, in the layout of `embed_file`.
"""

import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa

from deepfloyd_core.arrow import mapped_table
from deepfloyd_core.config.keys import keys_of, read_by
from deepfloyd_core.config.run import Run
from deepfloyd_core.config.run_text import TextKeys
from deepfloyd_core.config.stages import STAGES
from deepfloyd_core.errors import ArtifactError
from deepfloyd_core.files import canonical_json, sha256_bytes
from deepfloyd_core.hashing import caption_id
from deepfloyd_core.models.identity import model_fingerprint
from deepfloyd_core.models.text_encoders import text_encoder_of
from deepfloyd_core.processes.jobs import JobRequest, S, part_requests
from deepfloyd_core.store.artifacts import Artifact, Request, damaged_parts, newest
from deepfloyd_core.store.manifest import Manifest, Summary
from deepfloyd_core.text.embed_file import EmbedFile
from deepfloyd_core.types import Identity, Json

if TYPE_CHECKING:
    import torch

log = logging.getLogger(__name__)

FORMAT = 6
FILES, CAPTIONS_FILE, TOKENS_SHEET = "embeds-*.arrow", "captions.arrow", "tokens.png"
_WHICH = ("captions", "captions_sha256")  # keys of the spec
# Keys that decide only how rows are stored: `generate`, which encodes as well but stores nothing, does not read them.
_STORED = tuple(sorted(keys_of(TextKeys, "embeds") - keys_of(TextKeys, "generated")))
CAPTIONS = pa.schema([("key", pa.uint64()), ("file", pa.int32()), ("place", pa.int32())])  # key: the caption_id


class EmbedsSummary(Summary):
    """The summary of text embeds."""

    captions: int
    texts: int  # what they are cleaned to, each once
    encoded: int
    taken_over: int  # of older embeds
    truncated: int  # texts longer than `length`
    tokens_lost: int
    special_tokens_removed: int
    emptied: int  # captions without a word after cleaning
    emptied_captions: tuple[str, ...]  # the first of them
    length: int  # tokens of a text
    width: int  # of a row
    bytes: int
    encoded_by_this_process: int
    shortened: int = 0  # captions that were cut before cleaning, see `bounds`


class PartSummary(Summary):
    """The summary of some files of text embeds."""

    encoded_by_this_process: int


class _Encoding(JobRequest[S]):
    text: TextKeys
    captions: tuple[str, ...]
    encoder_name: str  # of the text encoder, in TEXT_ENCODERS
    encoder: Path  # folder of the model that has it
    older: Artifact | None = None  # embeds to take rows over from


class EncodeRequest(_Encoding[EmbedsSummary]):
    """Store the hidden states of captions."""

    job = "embed"
    entry = "deepfloyd_core.text.encode:encode_captions"
    returns = EmbedsSummary


class EncodePartRequest(_Encoding[PartSummary]):
    """Make every nth file of the same embeds, and nothing else, as one of n processes."""

    job = "embed"
    entry = "deepfloyd_core.text.encode:encode_part"
    returns = PartSummary
    number: int  # 0 to parts - 1
    parts: int


def encode_job(run: Run, captions: Iterable[str], encoder: Path, older: Artifact | None = None) -> EncodeRequest:
    """The job that makes the embeds of captions."""
    config = run.config
    name = STAGES[config.first_stage].text_encoder
    return EncodeRequest(
        machine=config, text=config, captions=tuple(captions), encoder_name=name, encoder=encoder, older=older
    )


def encode_parts(request: EncodeRequest) -> list[EncodePartRequest]:
    """The requests that `embed_workers` processes run at once before the request itself; none for one process here."""
    return part_requests(EncodePartRequest, request, request.machine.parts(request.machine.embed_workers))


def run_captions(run: Run, captions: Iterable[str]) -> list[str]:
    """Every text that training and sampling need, once, sorted: captions, all prompts, the empty one."""
    return sorted({*captions, *run.config.prompts, *run.config.probes, run.config.validation_negative_prompt, ""})


def embeds_request(run: Run, captions: list[str], encoder: Path) -> Request:
    """Identity of the embeds: the texts, how they are cleaned, the keys of their encoding, the encoder and tokenizer."""
    kind = text_encoder_of(run.config.first_stage)
    spec = {
        "captions": len(captions),
        "captions_sha256": sha256_bytes(canonical_json(captions).encode()),
        "cleaner": ", ".join(f"{package} {metadata.version(package)}" for package in kind.cleaned_by),
        **read_by(run.config, "embeds", group=TextKeys),
    }
    return Request("text_embeds", FORMAT, spec, {"encoder": model_fingerprint(encoder, kind.parts)})


def older_embeds(workspace: Path, request: Request) -> Artifact | None:
    """The newest embeds that differ from the requested ones in their captions alone, so that their rows can be reused."""

    def same(other: Manifest) -> bool:
        found, wanted = (_without(spec, _WHICH) for spec in (other.spec, request.spec))
        return (found, other.inputs) == (wanted, request.inputs) and other.fingerprint != request.fingerprint

    return newest(workspace, "text_embeds", FORMAT, same)


def embeds_to_draw_with(run: Run, encoder: Path) -> Artifact | None:
    """The newest embeds of a workspace that were encoded as the run encodes a prompt: their texts need no encoder. encoder:
    the folder of its model. None: there are none, or a file of them is damaged, which is logged.
    """
    wanted = rows_identity(embeds_request(run, [], encoder))
    found = newest(run.workspace, "text_embeds", FORMAT, lambda other: _rows(other.spec, other.inputs) == wanted)
    if found and (fault := next(damaged_parts(found), None)):
        log.warning("%s; the texts are encoded anew", fault.removesuffix("."))
        return None
    return found


def rows_identity(embeds: Identity) -> Json:
    """The identity of a caption's hidden states: how it is cleaned and encoded, without the other captions and the files."""
    return _rows(embeds.spec, embeds.inputs)


def _rows(spec: Json, inputs: Mapping[str, str]) -> Json:
    return {**_without(spec, _WHICH + _STORED), **inputs}


def _without(spec: Json, keys: tuple[str, ...]) -> Json:
    return {key: value for key, value in spec.items() if key not in keys}


@dataclass(frozen=True)
class TruncatedText:
    """A text whose end T5 does not see."""

    text: str  # cleaned
    lost: int  # tokens
    length: int  # tokens that are kept
    captions: tuple[str, ...]  # the caption ids of what was cleaned to it


def truncated_texts(embeds: Artifact, most: int) -> list[TruncatedText]:
    """The texts that lost most tokens at their end."""
    found: list[tuple[int, str, int, int]] = []
    length = embeds.summary(EmbedsSummary).length
    for number, path in enumerate(sorted(embeds.path.glob(FILES))):
        file = EmbedFile(path)
        over = file.tokens - length
        if (over > 0).any():
            texts = file.texts
            found += [(-int(over[place]), texts[place], number, int(place)) for place in np.flatnonzero(over > 0)]
            found = sorted(found)[:most]
    if not found:
        return []
    table = mapped_table(embeds.path / CAPTIONS_FILE)
    keys, files, places = (table[name].to_numpy() for name in CAPTIONS.names)
    captions = {
        (number, place): tuple(f"{key:016x}" for key in keys[(files == number) & (places == place)])
        for _, _, number, place in found
    }
    return [TruncatedText(text, -over, length, captions[number, place]) for over, text, number, place in found]


class Embeds:
    """Random access to stored embeds: `embeds[caption_id]` is a (T, D) tensor; unpacked, it shares the file's pages."""

    def __init__(self, artifact: Artifact) -> None:
        table = mapped_table(artifact.path / CAPTIONS_FILE)
        self._keys, self._file, self._place = (table[name].to_numpy() for name in CAPTIONS.names)
        self._files = [EmbedFile(path) for path in sorted(artifact.path.glob(FILES))]

    def __getitem__(self, name: str) -> "torch.Tensor":
        spot = self._spot(name)
        if spot is None:
            raise ArtifactError(f"The text embeds lack caption {name}. Run `deepfloyd verify` on the workspace.")
        return self._files[int(self._file[spot])].row(int(self._place[spot]))

    def __contains__(self, caption: str) -> bool:
        return self._spot(caption_id(caption)) is not None

    def _spot(self, name: str) -> int | None:
        """The place of a `caption_id`; None: it is not there."""
        key = np.uint64(int(name, 16))
        spot = int(np.searchsorted(self._keys, key))
        return spot if spot < len(self._keys) and self._keys[spot] == key else None

    def of(self, caption: str) -> "torch.Tensor":
        """The hidden states of a caption given as text."""
        return self[caption_id(caption)]

    def ids(self) -> list[str]:
        """The `caption_id` of every caption, sorted."""
        return [f"{key:016x}" for key in self._keys.tolist()]
