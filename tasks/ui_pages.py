"""What the Prefect UI shows of artifacts, as markdown: tables, and pictures as data URIs.

The artifact list loads every page, so pictures are shrunk until a page is below 300 KiB.
"""

import logging
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from deepfloyd_core.bundle.history import HistoryRow
from deepfloyd_core.bundle.measure_words import measure_words
from deepfloyd_core.bundle.named_files import cut_captions, rejected_files
from deepfloyd_core.bundle.version_chart import chart_uri, version_series
from deepfloyd_core.bundle.version_figures import three
from deepfloyd_core.config.stages import STAGES, Stage
from deepfloyd_core.crops.captioned import captioned_crops
from deepfloyd_core.crops.summary import CropsSummary
from deepfloyd_core.errors import DamagedError
from deepfloyd_core.index.ledger import INDEX_FILE, unfit_counts
from deepfloyd_core.index.sheets import SHEET, TWINS_SHEET
from deepfloyd_core.index.summary import IndexSummary
from deepfloyd_core.measures.figures import signed
from deepfloyd_core.measures.files import UpscalingFiles
from deepfloyd_core.measures.tables import MeasureTable
from deepfloyd_core.sampling.jobs import SamplesSummary
from deepfloyd_core.store.artifacts import Artifact
from deepfloyd_core.store.changes import label
from deepfloyd_core.store.counts import many
from deepfloyd_core.store.gc import Collection
from deepfloyd_core.store.gc_tables import markdown_page, outcome_words
from deepfloyd_core.text.embeds import TOKENS_SHEET, EmbedsSummary
from deepfloyd_core.training.jobs import SizeCrops, TrainingSummary
from tasks.artifact_page import artifact_key, show_artifact
from tasks.endings import unfit_line
from tasks.markdown import Titled, code, items, pictures, plain, table, titled_items, titled_table
from tasks.outbox import create_markdown_artifact
from tasks.page_keys import workspace_key

log = logging.getLogger(__name__)

MOST_NAMED = 20  # files on a page
MOST_VERSIONS = 200  # on a page
_LONG, _NAME = 120, 70  # characters of a caption or a reason, of a name


def show_index(index: Artifact, summary: IndexSummary, stages: tuple[Stage, ...], others: dict[str, int]) -> None:
    """Counts and reject reasons, with the pictures that each stage cannot use and `others`, files that are no pictures;
    rejected files by name and some of them as a picture, and some groups of duplicates.
    """
    unfit = {stage: unfit_counts(index, stage) for stage in stages}
    rows = [("**accepted**", "", summary.accepted)]
    rows += [("rejected", words(why), count) for why, count in summary.reasons.items()]
    rows.append(("**all files**", "", summary.inputs))
    for stage, counts in unfit.items():
        status = f"accepted, not for {STAGES[stage].title}"
        rows += [(status, words(why), count) for why, count in sorted(counts.items())]
    if summary.twins:
        groups = f"without the first of each of {many(summary.twin_groups, 'group')}"
        rows.append(("duplicates", groups, summary.twins))
    rows += [("no picture", plain(what), count) for what, count in sorted(others.items())]
    lines = table(["pictures", "reason", "number"], [(status, why, f"{count:,}") for status, why, count in rows])
    named = rejected_files(index, summary.reasons, MOST_NAMED) if summary.rejected else []
    lines += titled_items("Rejected files", [f"{_file(one.file)}: {plain(one.reason, _LONG)}" for one in named])
    more = [f"{summary.rejected - len(named):,} more rejected files are in the ledger.", ""]
    lines += more if named and summary.rejected > len(named) else []
    lines += [f"Ledger of all files: {code((index.path / INDEX_FILE).absolute())}", ""]
    sheets = (("Some rejected files of each reason", index.path / SHEET), ("Duplicates", index.path / TWINS_SHEET))
    show_artifact(index, summary, *((title, file) for title, file in sheets if file.exists()), above=lines)
    for stage, counts in unfit.items():
        if counts:
            log.info("%s", unfit_line(stage, counts))


def show_crops(crops: Artifact) -> None:
    """The page of crops, with a sheet of each of the main sizes: names of files and captions below the pictures."""
    sheets = list[Titled]()
    with suppress(OSError, ValueError, DamagedError):  # what is damaged is found by who needs it
        sheets += captioned_crops(crops)
    show_artifact(crops, crops.summary(CropsSummary), *sheets)


def show_embeds(embeds: Artifact, index: Artifact) -> None:
    """The page of text embeds, with the captions whose end T5 never sees, those that lose most tokens first."""
    summary = embeds.summary(EmbedsSummary)
    cut = cut_captions(embeds, index, MOST_NAMED) if summary.truncated else []
    lines = [
        f"{plain(one.text, _LONG)}: loses {many(one.tokens_lost, 'token')} at its end "
        f"({', '.join(map(_file, one.files)) or 'a prompt'})"
        for one in cut
    ]
    show_artifact(embeds, summary, TOKENS_SHEET, above=titled_items("Captions that T5 cuts", lines))


def show_samples(samples: Artifact, summary: SamplesSummary, stages: Sequence[Stage]) -> None:
    """The samples and the upscaler's measures; and on pages of their own the sheets of degraded low-res pictures and of
    zoomed details. stages: the upscalers.
    """
    lines = [line for measured in summary.tables(stages) for line in measure_lines(measured)]
    upscaled = [UpscalingFiles(stage, samples.path) for stage in stages]
    show_artifact(samples, summary, "sheet.png", *(files.sheet.name for files in upscaled), above=lines)
    for files in upscaled if summary.held_out else ():
        key, on = files.kind.table, f"{files.kind.title} on held-out pictures"
        if summary.spoilt:
            degraded = f"{on}, low-res degraded as in training"
            page = pictures([(degraded, files.spoilt[0]), (f"{degraded}, zoomed", files.spoilt[1])])
            create_markdown_artifact("\n".join(page), key=artifact_key(samples, f"{key}-spoilt"), description=degraded)
        page = pictures([(f"{on}, zoomed", files.details)])
        key = artifact_key(samples, f"{key}-details")
        create_markdown_artifact("\n".join(page), key=key, description=f"{on}, zoomed")


def measure_lines(measured: MeasureTable) -> list[str]:
    """An upscaler's measures: a line for each method of upscaling at each noise level; what the tuned model gains in the
    main measure; and what the columns mean.
    """
    words = measure_words(measured)
    return [*titled_table(measured.title, words.heads, words.rows), *items(words.notes)]


def training_tables(training: TrainingSummary) -> list[str]:
    """The held-out loss of the base and the tuned model at each timestep, if any picture is held out; and the sizes that
    batches were made of.
    """
    losses = [
        (t, three(base), three(tuned), signed(tuned - base, 4)) for t, (base, tuned) in training.eval_by_t.items()
    ]
    sizes = [
        (plain(row.dataset), f"{row.size} px", f"{row.crops:,}", f"{row.batches:,}", row.crops_of_last_batch)
        for row in training.buckets
    ]
    heads = ["timestep (of 1,000)", "base", "tuned", "change (less is better)"]
    sizes_heads = ["data set", "size", "crops", "batches an epoch", "crops of the last batch"]
    return [
        *titled_table("Held-out loss by timestep", heads, losses),
        *titled_table("Sizes that batches were made of", sizes_heads, sizes),
    ]


def words(reason: str) -> str:
    """A reason as a person says it."""
    return plain(reason.replace("_", " "))


def _file(name: str) -> str:
    """A file's name, its end where it is long."""
    return code(name if len(name) <= _NAME else f"…{name[1 - _NAME :]}")


def show_history(workspace: Path, rows: Sequence[HistoryRow]) -> None:
    """A drawing of the figures of a workspace's versions, then each version in words, the newest first."""
    chart = chart_uri(version_series(workspace))
    lines = [f"![figures of all versions]({chart})", ""] if chart else []
    for row in reversed(rows[-MOST_VERSIONS:]):
        when = f"{row.when[:16].replace('T', ' ')} UTC" if row.when else "not judged"
        lines += titled_items(f"Version {row.version}: {row.state}, {when}", [plain(line) for line in row.facts])
    left_out = len(rows) - MOST_VERSIONS
    lines += [f"and {many(left_out, 'older version')}", ""] if left_out > 0 else []
    description = f"{many(len(rows), 'version')} of {plain(str(workspace.absolute()))}"
    create_markdown_artifact("\n".join(lines), key=workspace_key("history", workspace), description=description)


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


def show_collection(workspace: Path, collection: Collection, deleted: bool) -> None:
    """What `gc` removed, or would remove, and what stays."""
    page = markdown_page(workspace, collection, deleted)
    create_markdown_artifact(
        page, key=workspace_key("gc", workspace), description=f"{'Removed' if deleted else 'Would be removed'} by gc"
    )
    for line in outcome_words(collection, deleted):
        log.info("gc: %s", line)
