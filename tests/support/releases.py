"""Bundles of small files, to publish: what versions are made of, without any training."""

import json
from pathlib import Path
from typing import Any

from typer.testing import CliRunner, Result

from deepfloyd_core.store.artifacts import Artifact, Request, WorkDir, materialise
from deepfloyd_core.store.manifest import Summary
from deepfloyd_core.store.registry import Outcome, publish
from deepfloyd_core.store.versions import Origin
from flows.commands.cli import app


def deepfloyd(*arguments: str) -> Result:
    """The command line, in this process."""
    return CliRunner().invoke(app, arguments)


def make(workspace: Path, kind: str, spec: dict[str, Any], *inputs: Artifact, **others: str) -> Artifact:
    """A finished artifact of one small file."""

    def build(work: WorkDir) -> Summary:
        (work.path / "stage1").mkdir(exist_ok=True)
        (work.path / "stage1" / "file").write_bytes(json.dumps(spec).encode())
        return Summary()

    request = Request(kind, 1, spec, {**{one.kind: f"{one.kind}/{one.fingerprint}" for one in inputs}, **others})
    return materialise(workspace, request, build)


class Release:
    """A workspace with two bundles of one data set each, and what they were made from."""

    def __init__(self, workspace: Path) -> None:
        self.workspace = workspace
        self.parts: dict[str, Artifact] = {}
        self.encoder = make(workspace, "text_embeds", {}, encoder="0" * 16)
        for name in ("old", "new"):
            index = make(workspace, "image_index", {"of": name}, data="1" * 16)
            pixels = make(workspace, "stage1_pixels", {}, index)
            lora = make(workspace, "a_kind_that_came_later", {}, pixels, self.encoder, model="2" * 16)
            bundle = make(workspace, "lora_bundle", {}, index, lora)
            self.parts |= {f"{name} {part.kind}": part for part in (index, pixels, lora, bundle)}

    def publish(self, name: str) -> int:
        return self.outcome(name).version.number

    def outcome(self, name: str, run_file: str = "") -> Outcome:
        parts = self.parts[f"{name} lora_bundle"], self.parts[f"{name} image_index"]
        return publish(self.workspace, *parts, Origin(run_file))
