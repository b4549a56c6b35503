"""What the Prefect UI shows of an artifact: tables, and pictures as data URIs inside markdown.

The artifact list loads every payload, so a picture is shrunk to JPEG until it is below 150 KiB.
"""

import logging
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from deepfloyd_core.bundle.history import HistoryRow
from deepfloyd_core.bundle.version_chart import chart_uri, version_series
from deepfloyd_core.config.stages import STAGES, Stage
from deepfloyd_core.index.ledger import unfit_counts
from deepfloyd_core.index.sheets import SHEET, TWINS_SHEET
from deepfloyd_core.index.summary import IndexSummary
from deepfloyd_core.measures.files import UpscalingFiles
from deepfloyd_core.pictures.data_uri import data_uri
from deepfloyd_core.sampling.jobs import SamplesSummary
from deepfloyd_core.store.artifacts import Artifact
from deepfloyd_core.store.changes import label
from deepfloyd_core.store.counts import many
from deepfloyd_core.store.gc import Collection
from deepfloyd_core.store.gc_tables import markdown_page, outcome_words
from deepfloyd_core.store.manifest import Summary
from deepfloyd_core.training.jobs import Bucket, SizeCrops, TrainingSummary
from tasks.endings import tell, unfit_line
from tasks.outbox import create_markdown_artifact, create_table_artifact
from tasks.page_keys import workspace_key

log = logging.getLogger(__name__)


def show_index(index: Artifact, summary: IndexSummary, stages: tuple[Stage, ...], others: dict[str, int]) -> None:
    """Counts and reject reasons as a table, with the pictures that each stage cannot use and `others`, files that are
    no pictures; some of the rejected files as a picture.
    """
    unfit = {stage: unfit_counts(index, stage) for stage in stages}
    rows: list[dict[str, str | int]] = [{"status": "accepted", "reason": "", "pictures": summary.accepted}]
    rows += [{"status": "rejected", "reason": why, "pictures": count} for why, count in summary.reasons.items()]
    rows.append({"status": "all inputs", "reason": "", "pictures": summary.inputs})
    for stage, counts in unfit.items():
        status = f"accepted, not for {STAGES[stage].title}"
        rows += [{"status": status, "reason": why, "pictures": count} for why, count in sorted(counts.items())]
    if summary.twins:
        groups = f"without the first of each of {many(summary.twin_groups, 'group')}"
        rows.append({"status": "duplicates", "reason": groups, "pictures": summary.twins})
    rows += [{"status": "no picture", "reason": what, "pictures": count} for what, count in sorted(others.items())]
    create_table_artifact(rows, key=_key(index, "image-index"), description=f"Ledger: `{index.path / 'index.parquet'}`")
    sheet = index.path / SHEET
    # Also without a sheet: the UI would go on showing the one of an earlier run.
    page = f"![{SHEET}]({data_uri(sheet)})" if sheet.exists() else "Every file was accepted, or left out by a setting."
    create_markdown_artifact(
        page, key=_key(index, "image-index-rejected"), description="Some rejected files of each reason"
    )
    sheet = index.path / TWINS_SHEET
    page = f"![{TWINS_SHEET}]({data_uri(sheet)})" if sheet.exists() else "There are no duplicates."
    create_markdown_artifact(page, key=_key(index, "image-index-twins"), description="Some groups of duplicates")
    tell(index, summary)
    for stage, counts in unfit.items():
        if counts:
            log.info("%s", unfit_line(stage, counts))


def show_pictures(artifact: Artifact, summary: Summary, *names: str) -> None:
    """The summary of an artifact and the named pictures of its directory, as one markdown page."""
    head = f"### {label(artifact.kind)} `{artifact.fingerprint}`"
    lines = [head, "", f"`{artifact.path}`", "", *_table(summary)]
    for name in names:
        if (artifact.path / name).exists():
            lines += ["", f"`{name}`", "", f"![{name}]({data_uri(artifact.path / name)})"]
    key = _key(artifact, artifact.kind.replace("_", "-"))
    create_markdown_artifact("\n".join(lines), key=key, description=label(artifact.kind))
    tell(artifact, summary)


def show_upscaled(artifact: Artifact, files: UpscalingFiles, samples: SamplesSummary) -> None:
    """An upscaler's measures as tables, a line for each method of upscaling at each noise level of the low-res picture;
    and the sheets of degraded low-res pictures and of zoomed details, on pages of their own.
    """
    for table in samples.tables([files.stage]):
        create_table_artifact(table.rows(), key=_key(artifact, table.key), description=table.title)
    key, on = files.kind.table, f"{files.kind.title} on held-out pictures"
    if samples.spoilt:
        pages = "\n\n".join(f"![{sheet.name}]({data_uri(sheet)})" for sheet in files.spoilt)
        create_markdown_artifact(
            pages, key=_key(artifact, f"{key}-spoilt"), description=f"{on}, low-res degraded as in training"
        )
    page = f"![{files.details.name}]({data_uri(files.details)})"
    create_markdown_artifact(page, key=_key(artifact, f"{key}-details"), description=f"{on}, zoomed")


def show_held_out(lora: Artifact, training: TrainingSummary) -> None:
    """The held-out loss of the base and the tuned model at each timestep, if any picture is held out."""
    if rows := training.by_timestep:
        key = _key(lora, f"{lora.kind.replace('_', '-')}-held-out")
        create_table_artifact(rows, key=key, description="Loss on the held-out pictures by timestep")


def show_history(workspace: Path, rows: Sequence[HistoryRow]) -> None:
    """The versions of a workspace, and a drawing of their figures."""
    table = [{name: "\n".join(cell) if isinstance(cell, tuple) else cell for name, cell in vars(row).items()}
             for row in rows]  # fmt: skip
    key = workspace_key("history", workspace)
    create_table_artifact(table, key=key, description=f"Versions of `{workspace.absolute()}`")
    chart = chart_uri(version_series(workspace))
    page = f"![figures of all versions]({chart})" if chart else "There are no two versions with figures to compare."
    create_markdown_artifact(page, key=f"{key}-chart", description=f"Figures of all versions of {workspace.name}")


def show_buckets(lora: Artifact, buckets: Sequence[Bucket]) -> None:
    """The sizes that batches were made of."""
    key, rows = _key(lora, f"{lora.kind.replace('_', '-')}-buckets"), [row.record for row in buckets]
    create_table_artifact(rows, key=key, description="Batches of each size in an epoch")


def warn_of_small_sizes(kind: str, sizes: Sequence[SizeCrops], batch_size: int) -> None:
    """Warn of sizes with too few crops to fill a batch."""
    small = [row for row in sizes if row.crops < batch_size]
    if not small:
        return
    named = [f"{row.size} of {row.dataset} has {row.crops}" for row in small]
    of_them = f"of {many(len(sizes), 'size')} {many(len(small), 'has', 'have')} fewer crops"
    if len(sizes) == 1:
        of_them = "there are fewer crops"
    more = f" and {len(small) - 5} more" if len(small) > 5 else ""
    log.warning(
        "%s: %s than train_batch_size (%d), so batches are smaller: %s%s. %s",
        label(kind), of_them, batch_size, ", ".join(named[:5]), more, _batch_advice(sizes, batch_size),
    )  # fmt: skip


def _batch_advice(sizes: Sequence[SizeCrops], batch_size: int) -> str:
    """How batches can reach their full size; for sets with too few crops for that, what does not help."""
    crops: Counter[str] = Counter()
    for row in sizes:
        crops[row.dataset] += row.crops
    if max(crops.values()) < batch_size:
        largest = max(row.crops for row in sizes)
        return f"Add pictures, or set train_batch_size = {largest}: the steps stay the same"
    return "Fewer crop_aspect_buckets or a larger aspect_bucket_alignment merge sizes"


def show_truncated(embeds: Artifact, lost: list[tuple[str, int]]) -> None:
    """The captions whose end T5 never sees, those that lose most tokens first."""
    rows = [{"tokens lost": count, "caption": text} for text, count in lost]
    create_table_artifact(
        rows or [{"tokens lost": 0, "caption": "No caption is too long."}], key=_key(embeds, "text-embeds-truncated"),
        description="Captions that are longer than tokenizer_max_length",
    )  # fmt: skip


def show_collection(workspace: Path, collection: Collection, deleted: bool) -> None:
    """What `gc` removed, or would remove, and what stays."""
    page = markdown_page(workspace, collection, deleted)
    create_markdown_artifact(
        page, key=workspace_key("gc", workspace), description=f"{'Removed' if deleted else 'Would be removed'} by gc"
    )
    for line in outcome_words(collection, deleted):
        log.info("gc: %s", line)


def _key(artifact: Artifact, page: str) -> str:
    return workspace_key(page, artifact.path.parents[1])


def _table(summary: Summary) -> list[str]:
    """The summary's single figures and lists; nothing if there is none."""
    shown = {key: value for key, value in summary.record.items() if not isinstance(value, dict) and key != "buckets"}
    rows = [f"| {key.replace('_', ' ')} | {_shown(value)} |" for key, value in shown.items() if value != []]
    return ["| measure | value |", "|---|---|", *rows] if rows else []


def _shown(value: object) -> str:
    if isinstance(value, list):
        return ", ".join(_shown(item) for item in value)
    return f"{value:.6g}" if isinstance(value, float) else str(value)
