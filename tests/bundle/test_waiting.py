"""A retraining waits for more pictures or days where the run file says so, and only for these."""

from datetime import UTC, datetime, timedelta

import pytest
from data_world import DataWorld
from PIL import Image

from deepfloyd_core.bundle.planned import planned_bundle
from deepfloyd_core.bundle.waiting import waiting
from deepfloyd_core.store.artifacts import Artifact
from deepfloyd_core.store.registry import publish


def _picture(grey: int) -> Image.Image:
    return Image.new("RGB", (64, 64), (grey, grey, grey))


LEARNS = {"max_train_steps": 6, "train_batch_size": 2, "num_eval_images": 0}


@pytest.fixture
def published(world: DataWorld) -> DataWorld:
    """A world of four pictures, of which version 1 was made; of its bundle only the identity is there."""
    for number in range(4):
        world.add(f"{number}.png", _picture(number))
    run = world.load(stages=(1,), **LEARNS)
    index = world.index(run)
    planned = planned_bundle(run, index)
    assert planned is not None
    publish(run.workspace, Artifact("lora_bundle", planned.fingerprint, run.workspace / planned.name), index)
    return world


def _reason(world: DataWorld, later_days: float = 0.0, **keys: float) -> str | None:
    run = world.load(stages=(1,), **{**LEARNS, **keys})
    outcome = waiting(run, world.index(run), datetime.now(UTC) + timedelta(days=later_days))
    assert outcome is None or (outcome.version.number, outcome.state, outcome.is_new) == (1, "champion", False)
    return outcome.reason if outcome else None


def test_it_waits_for_so_many_new_or_changed_pictures(published: DataWorld) -> None:
    published.add("new.png", _picture(100))
    published.add("3.png", _picture(200))
    assert _reason(published) is None, "nobody asked it to wait"
    assert _reason(published, retrain_min_new_pictures=3) == "waiting, 2 new pictures of 3 (retrain_min_new_pictures)"
    assert _reason(published, retrain_min_new_pictures=2) is None


def test_it_waits_for_so_many_days(published: DataWorld) -> None:
    published.add("new.png", _picture(100))
    assert _reason(published, retrain_min_days=7, later_days=2.5) == "waiting, 2.5 of 7 days (retrain_min_days)"
    assert _reason(published, retrain_min_days=7, later_days=7.1) is None
    both = _reason(published, retrain_min_days=7, retrain_min_new_pictures=2)
    assert both is not None and " of 2 (retrain_min_new_pictures) and 0.0 of 7 days" in both


def test_it_does_not_wait_when_a_picture_was_withdrawn_or_a_setting_changed(published: DataWorld) -> None:
    published.add("new.png", _picture(100))
    assert _reason(published, retrain_min_new_pictures=9, lora_rank=2) is None
    (published.folder / "pictures" / "0.png").unlink()
    assert _reason(published, retrain_min_new_pictures=9) is None
