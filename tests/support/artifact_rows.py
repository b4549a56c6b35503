"""What tests read back from artifacts, by pyarrow's own means rather than by the readers under test."""

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from deepfloyd_core.store.artifacts import Artifact, Request

SOME_EVAL_SET = Request("eval_set", 1, {"seed": 0, "stage1": {}, "stage2": {}}, {})  # for requests where any will do


def ledger(index: Artifact) -> dict[str, dict[str, Any]]:
    """The rows of an index by source."""
    rows = pq.read_table(index.path / "index.parquet").to_pylist()
    by_source = {row["source"]: row for row in rows}
    assert len(by_source) == len(rows), "a source has two rows"
    return by_source


def times(pixels: Artifact) -> list[int]:
    """How often an epoch shows each of `live_rows`."""
    found: list[int] = pa.ipc.open_file(pixels.path / "rows.arrow").read_all()["times"].to_pylist()
    return found


def shown_rows(pixels: Artifact) -> list[dict[str, Any]]:
    """What an epoch shows: the rows that count, each as often as it is shown, with their pixels."""
    return [row for row, count in zip(live_rows(pixels), times(pixels), strict=True) for _ in range(count)]


def live_rows(pixels: Artifact, stage: int | None = None) -> list[dict[str, Any]]:
    """The rows that count, in order, with their pixels; a shard may hold others, of pictures that are gone."""
    files = sorted(pixels.path.glob("stage*.parquet"))
    shards = [pq.read_table(file).to_pylist() for file in files]
    listed = pa.ipc.open_file(pixels.path / "rows.arrow").read_all().to_pylist()
    wanted = [row for row in listed if files[row["file"]].name.startswith(f"stage{stage or ''}")]
    return [shards[row["file"]][row["place"]] for row in wanted]


def sealed_manifest(**inputs: str) -> dict[str, Any]:
    """The record of an artifact of which only its inputs matter."""
    made = {"started": "2000-01-01T00:00:00+00:00", "seconds": 1.0, "python": "3", "machine": "x", "packages": {}}
    empty: dict[str, Any] = {"spec": {}, "files": [], "summary": {}, "provenance": made}
    return {"kind": "text_embeds", "format": 1, "fingerprint": "0" * 16, "inputs": inputs, **empty}


def finished_names(workspace: Path) -> set[str]:
    """`KIND/FINGERPRINT` of each finished artifact."""
    return {str(file.parent.relative_to(workspace)) for file in workspace.glob("*/*/manifest.json")}
