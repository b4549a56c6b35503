"""A stage's projected text: the output of its UNet's text modules for T5's hidden states, computed once and stored.

A LoRA does not change `encoder_hid_proj` and `add_embedding`, so their outputs depend on caption and UNet alone.
Storing them takes, for IF-I-M, 118,272 + 1,536 bytes a caption instead of T5's 630,784, and the trainer does not load
56.7 M of 371.6 M parameters. Captions are projected one at a time: so the bits do not depend on other captions, and
equal those of a stock UNet that is given that caption alone.
"""

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa

from deepfloyd_core.arrow import mapped_table, mapped_tensor
from deepfloyd_core.config.run import Run
from deepfloyd_core.config.stage import StageConfig
from deepfloyd_core.config.stage_run import Precision
from deepfloyd_core.config.stages import Stage
from deepfloyd_core.errors import ArtifactError
from deepfloyd_core.files import atomic_path, canonical_json, sha256_bytes
from deepfloyd_core.hashing import checksum
from deepfloyd_core.models.identity import model_fingerprint
from deepfloyd_core.processes.jobs import Job, JobRequest
from deepfloyd_core.store.artifacts import Artifact, Request, newest
from deepfloyd_core.store.damage import damaged, reading
from deepfloyd_core.store.manifest import Manifest, Summary
from deepfloyd_core.store.parts import finish_part, part_is_whole
from deepfloyd_core.store.reuse import files_as_recorded
from deepfloyd_core.text.embed_file import SUM
from deepfloyd_core.text.embeds import Embeds, rows_identity
from deepfloyd_core.types import Identity, Report

if TYPE_CHECKING:
    import torch

    from deepfloyd_core.diffusion.loss import Text

FORMAT = 4
FILES = "text-*.arrow"
FILE_BYTES = 256 << 20  # a kill costs at most one such file
WRITE_CAPTIONS = 64  # held in memory at once: 8 MB for IF-I-M
# The layers of a UNet's text modules that an adapter could be put on.
TEXT_LAYERS = (
    "encoder_hid_proj", "add_embedding.proj",
    "add_embedding.pool.k_proj", "add_embedding.pool.q_proj", "add_embedding.pool.v_proj",
)  # fmt: skip


class ProjectionSummary(Summary):
    """The summary of a stage's text."""

    captions: int
    taken_over: int  # of an older text
    parameters: int  # of the UNet's text modules
    bytes: int


class ProjectRequest(JobRequest[ProjectionSummary]):
    """Project every caption of the embeds."""

    job = "project"
    entry = "deepfloyd_core.text.projection:project_captions"
    returns = ProjectionSummary
    precision: Precision
    model: Path  # folder of the stage's base model
    text_embeds: Artifact
    older: Artifact | None = None  # a text of the stage, whose captions are copied from files that are as written


def project_job(run: Run, stage: Stage, model: Path, embeds: Artifact, older: Artifact | None = None) -> ProjectRequest:
    """The job that makes a stage's text."""
    precision = run.config.stage(stage).mixed_precision
    return ProjectRequest(machine=run.config, precision=precision, model=model, text_embeds=embeds, older=older)


def text_is_frozen(config: StageConfig) -> bool:
    """Whether training leaves the text modules unchanged, so that their outputs can be stored."""
    if config.model_type == "full":
        return False
    if config.controlnet:
        return True  # its copy of the encoder has none
    targets = config.lora_target_modules
    return not any(layer == name or layer.endswith(f".{name}") for layer in TEXT_LAYERS for name in targets)


def text_request(run: Run, stage: Stage, folder: Path, embeds: Identity) -> Request:
    """Identity of a stage's text: T5's hidden states, the UNet in `folder`, and the dtype that it computes in."""
    spec = {"mixed_precision": run.config.stage(stage).mixed_precision, "rows": rows_identity(embeds)}
    inputs = {"text_embeds": embeds.name, "unet": model_fingerprint(folder, ("unet",))}
    return Request(f"stage{stage}_text", FORMAT, spec, inputs)


def text_identity(text: Identity) -> str:
    """The identity of a caption's rows in a stage's text, or in the embeds, whatever other captions are stored with it."""
    rows = rows_identity(text) if text.kind == "text_embeds" else {**text.spec, "unet": text.inputs["unet"]}
    return sha256_bytes(canonical_json(rows).encode())[:16]


def older_text(workspace: Path, request: Request) -> Artifact | None:
    """The newest text of the stage that differs in its captions alone, so that captions can be reused."""

    def same(other: Manifest) -> bool:
        found, wanted = (other.spec, other.inputs["unet"]), (request.spec, request.inputs["unet"])
        return found == wanted and other.fingerprint != request.fingerprint

    return newest(workspace, request.kind, FORMAT, same)


def project_captions(job: Job[ProjectRequest]) -> ProjectionSummary:
    """Project every caption of the embeds, resuming at the first unfinished file."""
    from deepfloyd_core.models.torch_device import pick_device
    from deepfloyd_core.models.unet import DTYPES, load_text_modules, use_threads

    request, machine = job.request, job.request.machine
    use_threads(machine.num_threads)
    modules = load_text_modules(request.model, DTYPES[request.precision]).to(pick_device(machine.device))
    embeds, project = Embeds(request.text_embeds), projector(modules, request.precision)
    names = sorted(embeds.ids())
    older = request.older
    held = Projected(older, list(files_as_recorded(older, FILES))) if older else None

    def text_of(name: str) -> "tuple[torch.Tensor, torch.Tensor]":
        if held is None or name not in held:
            return project(embeds[name])
        text = held.batch([name])
        assert text.pooled is not None  # both are stored
        return text.rows, text.pooled

    store(job.out, names, text_of, job.report)
    taken_over = sum(name in held for name in names) if held else 0
    return ProjectionSummary(
        captions=len(names),
        taken_over=taken_over,
        parameters=sum(param.numel() for param in modules.parameters()),
        bytes=sum(file.stat().st_size for file in job.out.glob(FILES)),
    )


def projector(
    modules: "torch.nn.ModuleDict", precision: str
) -> "Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]":
    """A function from T5's hidden states of a caption (T, D) to its projected rows (1, T, C) and pooled vector (1, E).

    It computes on the modules' device, with the trainer's dtype and autocast, and returns to the CPU.
    """
    import torch

    from deepfloyd_core.models.unet import autocast

    hidden, added = modules["encoder_hid_proj"], modules["add_embedding"]
    weight = next(modules.parameters())

    def project(raw: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        batch = torch.stack([raw]).to(weight.device, weight.dtype)
        with torch.inference_mode(), autocast(weight.device, precision):
            return hidden(batch).cpu(), added(batch).cpu()

    return project


def store(
    out: Path, names: list[str], project: "Callable[[str], tuple[torch.Tensor, torch.Tensor]]", report: Report
) -> None:
    """Write the output of `project` for each caption id into files of about 256 MiB; finished files are skipped."""
    done = 0

    def stored(count: int) -> None:
        nonlocal done
        done += count
        report(done, len(names), "captions projected")

    per_file = max(1, FILE_BYTES // sum(tensor.nbytes for tensor in project(names[0])))
    for number, start in enumerate(range(0, len(names), per_file)):
        file, part = out / f"text-{number:05d}.arrow", names[start : start + per_file]
        if part_is_whole(file):
            stored(len(part))
        else:
            _write(file, part, project, stored)
            finish_part(file)


class Projected:
    """Random access to a stage's text by caption id; the files stay on disk and are mapped. A process checks a caption's
    rows when it first reads them.
    """

    def __init__(self, artifact: Artifact, files: list[Path] | None = None) -> None:
        """`files`: those of the artifact to read; unset: all."""
        self._artifact = artifact
        self._columns: list[tuple[torch.Tensor, ...]] = []  # rows and pooled of each record batch
        self._where: dict[str, tuple[int, int]] = {}  # record batch and place in it
        self._batches: list[tuple[Path, pa.RecordBatch]] = []
        self._checked: set[str] = set()
        for file in sorted(artifact.path.glob(FILES)) if files is None else files:
            with reading(file):
                table = mapped_table(file)
                table.validate(full=True)  # an offset that is wrong would lead out of the file
                for batch in table.to_batches():
                    names = batch.column("caption_id").to_pylist()
                    self._where |= {name: (len(self._columns), place) for place, name in enumerate(names)}
                    self._columns.append((_mapped(batch, "rows"), _mapped(batch, "pooled")))
                    self._batches.append((file, batch))

    def __contains__(self, name: str) -> bool:
        return name in self._where

    def batch(self, names: list[str]) -> "Text":
        """The texts of caption ids, in their order. Raises ArtifactError for a missing one, and DamagedError for one that
        is not as written.
        """
        import torch

        from deepfloyd_core.diffusion.loss import Text

        lacking = [name for name in names if name not in self._where]
        if lacking:
            for name in self._where:  # a damaged id may be why
                self._check(name)
            stored = f"{self._artifact.kind} {self._artifact.fingerprint}"
            raise ArtifactError(f"{stored} lacks caption {lacking[0]}. Run `deepfloyd verify` on the workspace.")
        for name in set(names) - self._checked:
            self._check(name)
        where = [self._where[name] for name in names]
        found = [[column[place] for column in self._columns[batch]] for batch, place in where]
        return Text(*map(torch.stack, zip(*found, strict=True)))

    def _check(self, name: str) -> None:
        number, place = self._where[name]
        file, batch = self._batches[number]
        with reading(file):
            is_whole = _row_sum(batch, place) == batch.column(SUM)[place].as_py()
        if not is_whole:
            raise damaged(file, f"caption {name} has other bytes than were written")
        self._checked.add(name)


def raw_texts(artifact: Artifact) -> Callable[[list[str]], "Text"]:
    """T5's own hidden states by caption id, for a training that changes the text modules."""
    import torch

    from deepfloyd_core.diffusion.loss import Text

    embeds = Embeds(artifact)
    return lambda names: Text(torch.stack([embeds[name] for name in names]))


def _write(
    file: Path,
    names: list[str],
    project: "Callable[[str], tuple[torch.Tensor, torch.Tensor]]",
    stored: Callable[[int], None],
) -> None:
    import torch

    with atomic_path(file) as tmp, pa.OSFile(str(tmp), "wb") as sink, contextlib.ExitStack() as stack:
        writer = None
        for start in range(0, len(names), WRITE_CAPTIONS):
            part = names[start : start + WRITE_CAPTIONS]
            columns = [torch.cat(column) for column in zip(*map(project, part), strict=True)]
            batch = _record_batch(part, *columns)
            writer = writer or stack.enter_context(pa.ipc.new_file(sink, batch.schema))
            writer.write_batch(batch)
            stored(len(part))


def _record_batch(names: list[str], rows: "torch.Tensor", pooled: "torch.Tensor") -> pa.RecordBatch:
    """rows: (N, T, C), pooled: (N, E)."""
    import torch

    fields, arrays = [pa.field("caption_id", pa.string(), nullable=False)], [pa.array(names)]
    for name, tensor in (("rows", rows), ("pooled", pooled)):
        raw = pa.py_buffer(tensor.contiguous().view(torch.uint8).numpy().reshape(-1))
        kind = pa.binary(raw.size // len(names))
        form = {"dtype": {torch.bfloat16: "bf16", torch.float32: "fp32"}[tensor.dtype], "width": str(tensor.shape[-1])}
        fields.append(pa.field(name, kind, nullable=False, metadata=form))
        arrays.append(pa.FixedSizeBinaryArray.from_buffers(kind, len(names), [None, raw]))
    batch = pa.record_batch(arrays, schema=pa.schema(fields))
    sums = pa.array([_row_sum(batch, place) for place in range(len(batch))], pa.uint64())
    return batch.append_column(pa.field(SUM, pa.uint64(), nullable=False), sums)


def _row_sum(batch: pa.RecordBatch, place: int) -> int:
    """The checksum of a caption's rows and pooled vector, of its id, and of how they are stored."""
    total = batch.column("caption_id")[place].as_py()
    for name in ("rows", "pooled"):
        column, form = batch.column(name), batch.schema.field(name).metadata
        size = column.type.byte_width
        start = (column.offset + place) * size
        raw = memoryview(column.buffers()[1])[start : start + size]
        total = checksum(raw, f"{total} {form[b'dtype'].decode()} {form[b'width'].decode()}".encode())
    return int(total)


def _mapped(batch: pa.RecordBatch, name: str) -> "torch.Tensor":
    """A column as one tensor, (N, T, C) or (N, E), that shares the file's pages."""
    column, form = batch.column(name), batch.schema.field(name).metadata
    size = column.type.byte_width
    raw = np.frombuffer(column.buffers()[1], np.uint8, len(batch) * size, column.offset * size)
    tensor = mapped_tensor(raw, form[b"dtype"].decode()).reshape(len(batch), -1, int(form[b"width"]))
    return tensor[:, 0] if name == "pooled" else tensor
