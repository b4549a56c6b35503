"""Text embeds: every caption through T5 once, all 77 rows of it, in Arrow files that are mapped straight into torch.

IF's UNet gets no attention mask, so the rows of the padding matter and are stored as well. Uncompressed Arrow IPC costs
630,784 bytes a caption with T5-XXL in bf16 and 0.05 ms a read. The encoder lives in a job's process and dies with it.
"""

import hashlib
import warnings
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from deepfloyd_core.artifacts import Artifact, Request, finish_part, part_is_whole
from deepfloyd_core.config import Run, RunConfig
from deepfloyd_core.errors import ArtifactError, ModelError
from deepfloyd_core.files import atomic_path, canonical_json, sha256_bytes, sha256_file
from deepfloyd_core.types import caption_id

if TYPE_CHECKING:
    import torch

    from deepfloyd_core.jobs import Job

FORMAT = 1
FILE_BYTES = 256 << 20  # a kill costs at most one such file


def run_captions(run: Run, captions: Iterable[str]) -> list[str]:
    """Every text that training and sampling will ask for, once, sorted: captions, prompts, negatives, the empty one."""
    return sorted({*captions, *run.config.prompts, run.config.validation_negative_prompt, ""})


def model_fingerprint(folder: Path, parts: Iterable[str]) -> str:
    """Fingerprint of a model's files: sha256 over the names and contents of the given subfolders.

    A hub snapshot's files are links to blobs named after their hash, which then need not be read.
    """
    digest = hashlib.sha256()
    for part in parts:
        for file in sorted((folder / part).iterdir()):
            if file.suffix in (".safetensors", ".json", ".model"):
                blob = file.resolve()
                name = blob.name if blob.parent.name == "blobs" else sha256_file(file)
                digest.update(f"{part}/{file.name} {name}\n".encode())
    return digest.hexdigest()[:16]


def embeds_request(run: Run, captions: list[str], encoder: Path) -> Request:
    """Identity of the embeds: the texts, how they are cleaned, the encoder and tokenizer, dtype and length."""
    spec = {
        "captions": len(captions),
        "captions_sha256": sha256_bytes(canonical_json(captions).encode()),
        "cleaner": f"diffusers {metadata.version('diffusers')}, ftfy {metadata.version('ftfy')}",
        "dtype": run.config.text_encoder_dtype,
        "tokenizer_max_length": run.config.tokenizer_max_length,
    }
    return Request("text_embeds", FORMAT, spec, {"encoder": model_fingerprint(encoder, ("text_encoder", "tokenizer"))})


def clean_captions(captions: list[str]) -> list[str]:
    """Clean texts as `IFPipeline.__call__` does by default, by its own function. Needs ftfy and beautifulsoup4."""
    from diffusers import IFPipeline

    cleaner = object.__new__(IFPipeline)  # the method uses no component
    return list(cleaner._text_preprocessing(captions, clean_caption=True))


def embed_job(job: "Job") -> dict[str, Any]:
    """Encode the captions in job.options into files of about 256 MiB, resuming at the first unfinished one."""
    from deepfloyd_core.models import DTYPES, load_text, pick_device, use_threads

    use_threads(job.config.num_threads)
    captions: list[str] = job.options["captions"]
    dtype = DTYPES[job.config.text_encoder_dtype]
    tokenizer, encoder = load_text(Path(job.options["encoder"]), dtype)
    device = pick_device(job.config.device)
    encoder.to(device)
    texts = _without_special_tokens(clean_captions(captions), tokenizer.all_special_tokens)
    width = encoder.config.d_model
    per_file = max(1, FILE_BYTES // (job.config.tokenizer_max_length * width * dtype.itemsize))
    truncated = 0
    for number, start in enumerate(range(0, len(captions), per_file)):
        file = job.out / f"embeds-{number:05d}.arrow"
        part = slice(start, start + per_file)
        tokens = [len(ids) for ids in tokenizer(texts[part]).input_ids]
        truncated += sum(count > job.config.tokenizer_max_length for count in tokens)
        if not part_is_whole(file):
            rows = encode(texts[part], tokenizer, encoder, job.config)
            _write(file, captions[part], texts[part], tokens, rows)
            finish_part(file)
        job.report(min(start + per_file, len(captions)), len(captions), "captions encoded")
    return {
        "captions": len(captions),
        "truncated": truncated,
        "width": width,
        "bytes": sum(file.stat().st_size for file in job.out.glob("*.arrow")),
    }


def encode(texts: list[str], tokenizer: Any, encoder: Any, config: RunConfig) -> "torch.Tensor":
    """Run T5 over cleaned texts: (N, 77, D) on the CPU. T5 gets its mask; rows are those of IFPipeline.encode_prompt.

    Each distinct text is encoded once. Raises ModelError when a row is not finite (fp16 overflows in T5-XXL).
    """
    import torch

    distinct = list(dict.fromkeys(texts))
    parts = []
    for start in range(0, len(distinct), config.embed_batch_size):
        batch = tokenizer(
            distinct[start : start + config.embed_batch_size], padding="max_length",
            max_length=config.tokenizer_max_length, truncation=True, return_tensors="pt",
        ).to(encoder.device)  # fmt: skip
        with torch.inference_mode():
            rows = encoder(batch.input_ids, attention_mask=batch.attention_mask)[0]
        if not torch.isfinite(rows).all():
            raise ModelError(f"T5 gave values that are not finite for one of {distinct[start : start + 3]}...")
        parts.append(rows.cpu())
    position = {text: number for number, text in enumerate(distinct)}
    return torch.cat(parts)[[position[text] for text in texts]]


class Embeds:
    """Random access to stored embeds: `embeds[caption_id]` is a (T, D) tensor that shares the file's pages."""

    def __init__(self, artifact: Artifact) -> None:
        self._where: dict[str, tuple[np.ndarray, str]] = {}
        self._shape = (-1, int(artifact.summary["width"]))
        for file in sorted(artifact.path.glob("*.arrow")):
            table = pa.ipc.open_file(pa.memory_map(str(file))).read_all()
            dtype = table.schema.metadata[b"dtype"].decode()
            for batch in table.to_batches():
                column = batch.column("embedding")
                size = column.type.byte_width
                raw = np.frombuffer(column.buffers()[1], np.uint8).reshape(-1, size)[column.offset :]
                for row, name in enumerate(batch.column("caption_id").to_pylist()):
                    self._where[name] = raw[row], dtype

    def __getitem__(self, name: str) -> "torch.Tensor":
        import torch

        if name not in self._where:
            raise ArtifactError(f"The text embeds lack caption {name}. Run `deepfloyd verify` on the workspace.")
        raw, dtype = self._where[name]
        kind = {"bf16": torch.bfloat16, "fp32": torch.float32}[dtype]
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="The given NumPy array is not writable")  # nobody writes to it
            return torch.from_numpy(raw).view(kind).reshape(self._shape)

    def ids(self) -> list[str]:
        """The caption ids that there are rows for."""
        return list(self._where)

    def of(self, caption: str) -> "torch.Tensor":
        """The rows of a caption given as text."""
        return self[caption_id(caption)]


def _without_special_tokens(texts: list[str], special: list[str]) -> list[str]:
    """A literal `</s>` in a caption would end it for T5."""
    for token in special:
        texts = [text.replace(token, " ") for text in texts]
    return texts


def _write(file: Path, captions: list[str], texts: list[str], tokens: list[int], rows: "torch.Tensor") -> None:
    import torch

    dtype = {torch.bfloat16: "bf16", torch.float32: "fp32"}[rows.dtype]
    raw = rows.contiguous().view(torch.uint8).numpy().reshape(-1)
    size = raw.size // len(captions)
    schema = pa.schema(
        [
            pa.field("caption_id", pa.string(), nullable=False),
            pa.field("caption", pa.string(), nullable=False),
            pa.field("tokens", pa.int32(), nullable=False),
            pa.field("embedding", pa.binary(size), nullable=False),
        ],
        metadata={"dtype": dtype},
    )
    column = pa.FixedSizeBinaryArray.from_buffers(pa.binary(size), len(captions), [None, pa.py_buffer(raw)])
    ids = pa.array([caption_id(caption) for caption in captions])
    arrays = [ids, pa.array(texts), pa.array(tokens, pa.int32()), column]
    batch = pa.record_batch(arrays, schema=schema)
    with atomic_path(file) as tmp, pa.OSFile(str(tmp), "wb") as sink, pa.ipc.new_file(sink, schema) as writer:
        writer.write_batch(batch)
