"""Makes the text embeds in its own process, which loads the encoder at the first missing text and ends with the job.

A file's name contains a hash of its texts, and a file is never rewritten. When a data set grows, the new version links
the existing files and encodes only the added texts. An interrupted build continues after the last finished file.
"""

import math
import time
import unicodedata
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from transformers import PreTrainedTokenizerBase

from deepfloyd_core.config.run_machine import Machine
from deepfloyd_core.config.run_text import TextKeys
from deepfloyd_core.errors import ModelError
from deepfloyd_core.files import atomic_path, canonical_json, sha256_bytes
from deepfloyd_core.hashing import caption_id
from deepfloyd_core.models.text_encoders import TEXT_ENCODERS
from deepfloyd_core.models.torch_device import pick_device
from deepfloyd_core.models.unet import DTYPES, use_threads
from deepfloyd_core.pictures.sheets import save_token_counts
from deepfloyd_core.processes.jobs import Job
from deepfloyd_core.store.artifacts import Artifact
from deepfloyd_core.store.counts import many
from deepfloyd_core.store.file_faults import need_room
from deepfloyd_core.store.parts import finish_part, part_is_whole, take_part
from deepfloyd_core.store.reuse import files_as_recorded, worth_keeping
from deepfloyd_core.text.bounds import bounded
from deepfloyd_core.text.embed_file import VALUE_BYTES, EmbedFile, embed_schema, stored_row, write_embed_file
from deepfloyd_core.text.embeds import (
    CAPTIONS,
    CAPTIONS_FILE,
    FILES,
    TOKENS_SHEET,
    EmbedsSummary,
    EncodePartRequest,
    EncodeRequest,
    PartSummary,
)
from deepfloyd_core.text.encoders import ENCODERS
from deepfloyd_core.types import Report, no_report

_SHOWN = 5  # of the captions without a word, in the summary
PACKED_SHARE = 0.7  # of the bytes, at most; 0.64 is usual


@dataclass(frozen=True)
class _Layout:
    """Which files of an older artifact are reused, and which texts each new file gets."""

    kept: dict[str, str]  # names, and their sha256
    made: dict[str, list[str]]  # the texts of each file to make
    stored: dict[str, tuple[EmbedFile, int]]  # texts of the older artifact: where they are


def has_words(text: str) -> bool:
    """Whether a text has a letter, a number or a symbol. A bare URL, for example, is cleaned to a full stop."""
    return any(unicodedata.category(sign)[0] in "LNS" for sign in text)


@dataclass(frozen=True)
class _Plan:
    """The texts to encode, and their files."""

    texts: list[str]  # of the captions, in their order
    special_tokens_removed: int
    tokens: dict[str, int]  # of each text, in the order in which texts are stored
    schema: pa.Schema
    layout: _Layout
    tokenizer: PreTrainedTokenizerBase


def encode_captions(job: Job[EncodeRequest]) -> EmbedsSummary:
    """Store the hidden states of the captions.

    Each file is finished on its own: an interrupted build continues after the last finished one. Raises StorageError
    when the disk has not enough room.
    """
    request, out = job.request, job.out
    plan = _plan(request)
    tokens, layout, length = plan.tokens, plan.layout, request.text.tokenizer_max_length
    for stray in set(out.glob(FILES)) - {out / name for name in (*layout.kept, *layout.made)}:
        stray.unlink()  # an interrupted build laid the texts out otherwise
    for name, digest in layout.kept.items():
        assert request.older is not None  # it has the file
        take_part(request.older.path / name, digest, out / name)
    encoded_now = _make_files(job, plan)
    _write_captions(out, request.captions, plan.texts)
    save_token_counts(list(tokens.values()), length, out / TOKENS_SHEET)
    encoded = sum(text not in layout.stored for made in layout.made.values() for text in made)
    lost = [count - length for count in tokens.values() if count > length]
    pairs = zip(request.captions, plan.texts, strict=True)
    emptied = [caption for caption, text in pairs if caption.strip() and not has_words(text)]
    return EmbedsSummary(
        captions=len(request.captions),
        texts=len(tokens),
        encoded=encoded,
        taken_over=len(tokens) - encoded,
        truncated=len(lost),
        tokens_lost=sum(lost),
        special_tokens_removed=plan.special_tokens_removed,
        emptied=len(emptied),
        emptied_captions=tuple(emptied[:_SHOWN]),
        length=length,
        width=int(plan.schema.metadata[b"width"]),
        bytes=sum(file.stat().st_size for file in out.glob(FILES)),
        encoded_by_this_process=encoded_now,
        shortened=sum(bounded(caption) != caption for caption in request.captions),
    )


def encode_part(job: Job[EncodePartRequest]) -> PartSummary:
    """Make every nth file of the embeds, and nothing else, as one of n processes. Raises as `encode_captions`."""
    plan, request = _plan(job.request), job.request
    own = dict(list(plan.layout.made.items())[request.number :: request.parts])
    plan = replace(plan, layout=replace(plan.layout, made=own))
    return PartSummary(encoded_by_this_process=_make_files(job, plan))


def _plan(request: EncodeRequest | EncodePartRequest) -> _Plan:
    use_threads(request.machine.num_threads)
    encoder, keys = ENCODERS[request.encoder_name], request.text
    tokenizer = encoder.load_tokenizer(request.encoder)
    texts, special = encoder.clean_captions(list(request.captions), tokenizer.all_special_tokens)
    tokens = _token_counts(tokenizer, sorted(set(texts)))
    width = encoder.row_width(request.encoder)
    schema = embed_schema(keys.text_encoder_dtype, keys.tokenizer_max_length, width, keys.embed_compression)
    per_file = max(1, int(keys.embed_file_mib * 2**20) // _row_bytes(schema))
    return _Plan(texts, special, tokens, schema, _lay_out(tokens, per_file, request.older), tokenizer)


def encode_prompts(prompts: list[str], name: str, folder: Path, keys: TextKeys, machine: Machine) -> torch.Tensor:
    """Hidden states (N, T, D) of a few prompts on the CPU, equal to the stored embeds; the encoder is freed on return.

    name: of the text encoder; folder: of the model that has it.
    """
    tokenizer = ENCODERS[name].load_tokenizer(folder)
    texts, _ = ENCODERS[name].clean_captions(prompts, tokenizer.all_special_tokens)
    ids = _token_ids(tokenizer, texts, keys.tokenizer_max_length)
    return _Encoder.load(name, folder, keys, machine).rows(texts, ids, no_report)


def _token_ids(tokenizer: PreTrainedTokenizerBase, texts: list[str], length: int) -> list[list[int]]:
    """The tokens of each text, cut to a length, with the end token kept."""
    return list(tokenizer(texts, truncation=True, max_length=length).input_ids) if texts else []


def _token_counts(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> dict[str, int]:
    """How many tokens each text has, including the end token, uncut; in the order of (count, text)."""
    counts = [len(ids) for ids in tokenizer(texts, verbose=False).input_ids]
    return dict(sorted(zip(texts, counts, strict=True), key=lambda item: (item[1], item[0])))


def _row_bytes(schema: pa.Schema) -> int:
    """Bytes of a row before it is packed."""
    size = VALUE_BYTES[schema.metadata[b"dtype"].decode()]
    return size * int(schema.metadata[b"length"]) * int(schema.metadata[b"width"])


def _lay_out(tokens: dict[str, int], capacity: int, older: Artifact | None) -> _Layout:
    """Texts of equal length are put together, so that they can be encoded together."""
    names = {caption_id(text): text for text in tokens}
    paths = files_as_recorded(older, FILES)
    held: list[list[str]] = []
    rows_in: list[int] = []
    stored: dict[str, tuple[EmbedFile, int]] = {}
    for path in paths:
        file = EmbedFile(path)
        ids = file.text_ids
        held.append([names[name] for name in ids if name in names])
        rows_in.append(len(ids))
        stored |= {names[name]: (file, place) for place, name in enumerate(ids) if name in names}
    stays = worth_keeping(np.array([len(texts) for texts in held]), np.array(rows_in), capacity)
    kept = {path.name: digest for (path, digest), keep in zip(paths.items(), stays, strict=True) if keep}
    there = {text for texts, keep in zip(held, stays, strict=True) if keep for text in texts}
    rest = [text for text in tokens if text not in there]
    made = {}
    for start in range(0, len(rest), capacity):
        part = rest[start : start + capacity]
        made[f"embeds-{sha256_bytes(canonical_json(part).encode())[:12]}.arrow"] = part
    return _Layout(kept, made, stored)


def _make_files(job: Job[EncodeRequest] | Job[EncodePartRequest], plan: _Plan) -> int:
    """Make the files that are not finished yet. Returns how many texts it encoded."""
    layout, schema, keys, machine = plan.layout, plan.schema, job.request.text, job.request.machine
    unfinished = {name: texts for name, texts in layout.made.items() if not part_is_whole(job.out / name)}
    _check_room(job.out, sum(map(len, unfinished.values())), schema)
    missing = {name: [text for text in texts if text not in layout.stored] for name, texts in unfinished.items()}
    total = sum(text not in layout.stored for texts in layout.made.values() for text in texts)
    todo = sum(map(len, missing.values()))
    progress, encoder = _Progress(job.report, total - todo, total), None

    def token_ids(name: str) -> list[list[int]]:
        return _token_ids(plan.tokenizer, missing[name], keys.tokenizer_max_length)

    with ThreadPoolExecutor(2) as pool:  # beside the encoder one file is written and the next one tokenised
        writing: Future[None] | None = None
        names = list(unfinished)
        ahead = [pool.submit(token_ids, name) for name in names[:1]]
        for place, name in enumerate(names):
            ids, encoded = ahead.pop().result(), {}
            ahead += [pool.submit(token_ids, later) for later in names[place + 1 : place + 2]]
            if ids:
                if encoder is None:
                    encoder = _Encoder.load(job.request.encoder_name, job.request.encoder, keys, machine, job.gpu)
                    files = sum(bool(texts) for texts in missing.values())
                    progress.forecast(encoder.forecast_s(todo, files), _stored_bytes(todo, schema))
                rows = encoder.rows(missing[name], ids, progress.step)
                encoded = dict(zip(missing[name], rows, strict=True))
                progress.finished(len(encoded))
            if writing:
                writing.result()
            writing = pool.submit(_write, job.out / name, unfinished[name], encoded, plan)
        if writing:
            writing.result()
    return todo


def _write(path: Path, texts: list[str], made: dict[str, torch.Tensor], plan: _Plan) -> None:
    packing = plan.schema.metadata[b"compression"].decode()
    rows = []
    for text in texts:
        file, place = plan.layout.stored.get(text, (None, 0))
        rows.append(file.stored(place) if file else stored_row(made[text], packing))
    write_embed_file(path, texts, [plan.tokens[text] for text in texts], rows, plan.schema)
    finish_part(path)


def _stored_bytes(rows: int, schema: pa.Schema) -> int:
    """Bytes of rows on the disk; an upper bound if they are compressed."""
    share = PACKED_SHARE if schema.metadata[b"compression"] == b"packed" else 1.0
    return int(share * rows * _row_bytes(schema))


def _check_room(out: Path, rows: int, schema: pa.Schema) -> None:
    advice = "Make room, use another workspace, or set embed_compression = packed (36 % less)"
    need_room(out, _stored_bytes(rows, schema), f"The embeds of {many(rows, 'text take', 'texts take')}", advice)


@dataclass
class _Progress:
    """Converts per-layer progress of one file into texts per second of the whole job."""

    report: Report
    done: int
    total: int

    def __post_init__(self) -> None:
        self._started, self._first, self._ahead = time.monotonic(), self.done, ""
        self.report(self.done, self.total, "texts to encode")

    def forecast(self, seconds: float, size: int) -> None:
        """Report the expected time and the bytes on disk before the first layer, and again until a file is done."""
        self._ahead = f"about {timedelta(seconds=math.ceil(seconds))} and {size / 2**20:,.1f} MiB left"
        self.report(self.done, self.total, self._ahead)
        self._started = time.monotonic()

    def step(self, done: int, total: int, line: str) -> None:
        """Texts of the current file; `line` names the layer."""
        now = self.done + done
        self.report(now, self.total, f"{self._rate(now)}, {self._ahead or line}")

    def finished(self, texts: int) -> None:
        """A file's texts are encoded."""
        self.done, self._ahead = self.done + texts, ""
        self.report(self.done, self.total, self._rate(self.done))

    def _rate(self, done: int) -> str:
        return f"{(done - self._first) / max(time.monotonic() - self._started, 1e-9):.1f} texts/s"


@dataclass(frozen=True)
class _Encoder:
    """A text encoder in memory or streamed, with the run's settings."""

    name: str
    loaded: Any
    keys: TextKeys
    machine: Machine

    @classmethod
    def load(cls, name: str, folder: Path, keys: TextKeys, machine: Machine, gpu: int = 0) -> "_Encoder":
        """gpu: as in `Job`."""
        dtype, device = DTYPES[keys.text_encoder_dtype], pick_device(machine.device, gpu)
        streamed, quantization = machine.text_encoder_streaming, keys.text_encoder_quantization
        return cls(name, ENCODERS[name].load_encoder(folder, dtype, device, streamed, quantization), keys, machine)

    @property
    def _sizes(self) -> tuple[int, int]:
        """Tokens of a text, and rows of a batch."""
        length = self.keys.tokenizer_max_length
        return length, self.machine.embed_batch_size * length

    def forecast_s(self, texts: int, files: int) -> float:
        return ENCODERS[self.name].forecast_s(self.loaded, texts, files, *self._sizes)

    def rows(self, texts: list[str], ids: list[list[int]], report: Report) -> torch.Tensor:
        """The rows of cleaned texts, given with their tokens, (N, T, D) on the CPU. ModelError: one is not finite."""
        made = ENCODERS[self.name].encode(self.loaded, ids, *self._sizes, report)
        good = torch.isfinite(made).flatten(1).all(1).tolist()
        if not all(good):
            title = TEXT_ENCODERS[self.name].title
            raise ModelError(f"{title} gave values that are not finite for {texts[good.index(False)]!r}.")
        return made


def _write_captions(out: Path, captions: Sequence[str], texts: list[str]) -> None:
    """Write captions.arrow: where each caption's text is."""
    where = {
        name: (number, place)
        for number, path in enumerate(sorted(out.glob(FILES)))
        for place, name in enumerate(EmbedFile(path).text_ids)
    }
    keys = np.array([int(caption_id(caption), 16) for caption in captions], np.uint64)
    spots = np.array([where[caption_id(text)] for text in texts], np.int32).reshape(-1, 2)
    order = np.argsort(keys)
    columns = [pa.array(keys[order]), pa.array(spots[order, 0]), pa.array(spots[order, 1])]
    with atomic_path(out / CAPTIONS_FILE) as tmp, pa.ipc.new_file(tmp, CAPTIONS) as writer:
        writer.write_batch(pa.RecordBatch.from_arrays(columns, schema=CAPTIONS))
