"""A run on the tiny cascade, and its models, for jobs that draw in the test's process."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from small_run import NewSmallRun

from deepfloyd_core.config.run import Run
from deepfloyd_core.models.folders import resolve
from deepfloyd_core.preflight.load import load_run


@pytest.fixture(scope="module")
def run(new_small_run: NewSmallRun, tmp_path_factory: pytest.TempPathFactory) -> Run:
    return load_run(new_small_run(tmp_path_factory.mktemp("drawing") / "run", 2).config)


@pytest.fixture(scope="module")
def models(run: Run) -> dict[Any, Path]:
    return {stage: resolve(run.config.stage(stage).model, stage, text=stage == 1) for stage in run.config.stages}


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """A picture with a gradient, of Stage II's size."""
    rows, columns = np.mgrid[:256, :256]
    pixels = np.stack([rows, columns, 255 - rows], axis=2).astype(np.uint8)
    Image.fromarray(pixels).save(tmp_path / "image.png")
    return tmp_path / "image.png"
