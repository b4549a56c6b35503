"""What a training shows of itself: comparisons pair by pair, TensorBoard files, the sheet, sizes of samples."""

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import NoReturn, cast

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from narrowing import known
from PIL import Image
from scipy import stats
from small_run import SmallRun
from summaries import summary_of

from deepfloyd_core.config.flavours import FLAVOURS
from deepfloyd_core.errors import ConfigError
from deepfloyd_core.files import write_note
from deepfloyd_core.models.unet import load_scheduler
from deepfloyd_core.preflight.load import load_run
from deepfloyd_core.sampling.specs import SampleSpec
from deepfloyd_core.store.artifacts import Artifact, Request, WorkDir, materialise
from deepfloyd_core.store.manifest import Summary
from deepfloyd_core.training.batches import BatchOrder, Draws, MixedOrder, TrainingRows
from deepfloyd_core.training.checkpoints import Checkpoint, StepMetrics, last_good, save_checkpoint
from deepfloyd_core.training.eval_loss import (
    HELD_OUT,
    SEEN,
    TIMESTEPS,
    GridLoss,
    GridPicture,
    compared,
    grid_losses,
    grid_pictures,
    mean_loss,
)
from deepfloyd_core.training.trackers import open_loggers, show_validation
from deepfloyd_core.training.validation import write_validations

BARS = load_scheduler(Path(FLAVOURS["tiny-i"].repo)).alphas_cumprod


def losses(seed: int, gain: float = 0.0, gain_seen: float = 0.0) -> list[GridLoss]:
    """A grid of 12 held-out pictures and 2 others, all of whose losses are lower by something."""
    rng = np.random.default_rng(seed)
    names = [(HELD_OUT, f"h{n}", gain) for n in range(12)] + [(SEEN, f"s{n}", gain_seen) for n in range(2)]
    return [
        GridLoss(part, name, t, float(rng.uniform(0.5, 1.5)) - less) for part, name, less in names for t in TIMESTEPS
    ]


def test_two_models_are_compared_picture_by_picture() -> None:
    """Both have the same draws, so a small gain is seen though pictures and timesteps differ by far more."""
    found = compared(losses(1), losses(1, gain=0.01, gain_seen=0.25))
    assert found is not None
    assert found.gain == pytest.approx([0.01, 0.01, 0.01])
    assert found.overfit_gap == pytest.approx(0.24)
    base, tuned = found.by_t[400]
    assert base - tuned == pytest.approx(0.01)
    assert base == pytest.approx(np.mean([row.loss for row in losses(1) if row.t == 400 and row.part == HELD_OUT]))


def test_a_difference_that_is_noise_has_an_interval_around_zero() -> None:
    base, other = losses(1), losses(2)
    middle, low, high = known(compared(base, other)).gain
    pictures = [
        np.mean([a.loss - b.loss for a, b in zip(base, other, strict=True) if a.image_id == f"h{n}"]) for n in range(12)
    ]
    assert middle == pytest.approx(np.mean(pictures))
    reference = stats.bootstrap(
        (pictures,), np.mean, method="percentile", n_resamples=10_000, rng=3
    ).confidence_interval
    assert (low, high) == pytest.approx((reference.low, reference.high), abs=0.01)
    assert low < 0 < high


def test_a_picture_has_its_draws_and_its_conditions_whichever_others_are_held_out() -> None:
    """So the figures of two versions can be paired: the draws follow from the picture, not from its place."""

    def echo(x_0: torch.Tensor, draws: Draws, caption_ids: list[str], pair: torch.Tensor | None) -> torch.Tensor:
        return x_0

    pixels = [torch.full((1, 8, 8, 3), number, dtype=torch.uint8) for number in range(4)]
    pictures = [GridPicture(HELD_OUT, f"h{number}", "a star", part) for number, part in enumerate(pixels)]
    alone, among = (grid_losses(some, echo, 100, BARS) for some in (pictures[2:3], pictures[::-1]))
    assert alone == [row for row in among if row.image_id == "h2"] and len({row.loss for row in among}) == 16
    (one,) = {row.conditions for row in alone}
    other = [
        replace(pictures[2], caption_id="a circle").conditions(100), pictures[2].conditions(200),
        replace(pictures[2], pixels=pixels[3]).conditions(100), replace(pictures[2], pair=pixels[2]).conditions(100),
        replace(pictures[2], pixels=pixels[2].reshape(1, 4, 16, 3)).conditions(100),
    ]  # fmt: skip
    assert len({one, *other}) == 6, "each decides the loss beside the model"
    assert replace(pictures[2], image_id="copy").conditions(100) == one


def test_a_models_cast_is_the_colour_shift_of_its_estimates_at_each_timestep() -> None:
    """A model that would draw the very picture, but 12 levels too red and 6 too dark in blue: 6 levels over the colours."""
    tint = torch.tensor([12.0, 0.0, -6.0])[None, :, None, None] / 127.5

    def tinted(x_0: torch.Tensor, draws: Draws, caption_ids: list[str], pair: torch.Tensor | None) -> torch.Tensor:
        bar = BARS[draws.t].reshape(-1, 1, 1, 1)
        x_t = bar.sqrt() * x_0 + (1 - bar).sqrt() * draws.noise
        return torch.as_tensor((x_t - bar.sqrt() * (x_0 + tint)) / (1 - bar).sqrt())

    pixels = torch.from_numpy(np.random.default_rng(0).integers(60, 190, (1, 16, 16, 3), dtype=np.uint8))
    rows = grid_losses([GridPicture(HELD_OUT, "h", "a star", pixels)], tinted, 100, BARS)
    assert [row.t for row in rows] == list(TIMESTEPS)
    assert [row.colour_shift for row in rows] == pytest.approx([6.0] * len(TIMESTEPS), abs=0.01)


def test_tensorboard_shows_a_resumed_run_once(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    out, picture = tmp_path / "stage1_lora" / "abc", tmp_path / "000.png"
    Image.new("RGB", (8, 8), (255, 0, 0)).save(picture)
    for first, end in ((0, 7), (4, 9)):  # killed in step 8, its newest checkpoint of step 4
        with open_loggers(("tensorboard",), {}, out, [StepMetrics(1, 0.0, 0.0, 0.0)] * first) as show:
            for step in range(first, end):
                show(step + 1, {"loss": float(step)}, ())
            show_validation(show, end, losses(1), [picture])
    seen = EventAccumulator(str(tmp_path / "tensorboard" / "stage1_lora-abc")).Reload()
    assert [(event.step, event.value) for event in seen.Scalars("loss")] == [(n + 1, float(n)) for n in range(9)]
    assert seen.Scalars("loss/held_out")[-1].value == pytest.approx(mean_loss(losses(1)))
    assert seen.Tags()["images"] == ["validation/000"]


def test_nothing_is_written_without_a_tracker(tmp_path: Path) -> None:
    with open_loggers((), {}, tmp_path / "a" / "b", []) as show:
        show(1, {"loss": 1.0}, ())
    assert not list(tmp_path.iterdir())


def test_the_last_good_checkpoint_is_named(tmp_path: Path) -> None:
    assert last_good(tmp_path) == "There is no checkpoint yet."
    for step in (3, 6):
        save_checkpoint(tmp_path, Checkpoint(step, {}, {}, {}, {}, []), 2)
    assert last_good(tmp_path).endswith("step-00000006.")


def test_a_changed_setting_does_not_continue_an_unfinished_run_and_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def killed(work: WorkDir) -> NoReturn:
        raise KeyboardInterrupt

    def request(batch: int) -> Request:
        return Request("stage1_lora", 1, {"train_batch_size": batch, "seed": 1}, {"pixels": "a"})

    for _ in range(2):  # the second one continues the first: nothing to say
        with pytest.raises(KeyboardInterrupt):
            materialise(tmp_path, request(4), killed)
    assert "not continued" not in caplog.text
    made = materialise(tmp_path, request(8), lambda work: summary_of())
    assert (
        f"the unfinished {request(4).fingerprint} is not resumed, because stage1.train_batch_size 4 -> 8."
        in caplog.text
    )
    assert [path.name for path in made.path.iterdir()] == ["manifest.json"]
    caplog.clear()
    materialise(tmp_path, request(32), lambda work: summary_of())
    assert "not continued" not in caplog.text, "said once: the newest finished one is younger"
    caplog.clear()
    materialise(tmp_path, request(4), lambda work: summary_of())
    materialise(tmp_path, request(16), lambda work: summary_of())
    assert "not continued" not in caplog.text, "nothing is unfinished any more"


@pytest.mark.parametrize(
    ("said", "sizes"),
    [
        ("64", ((64, 64),)),
        ("64,96,64x96,96x64", ((64, 64), (96, 96), (64, 96), (96, 64))),
        ("64, 64x64 ,96", ((64, 64), (96, 96))),
    ],
)
def test_samples_of_several_sizes(said: str, sizes: tuple[tuple[int, int], ...], small_run: SmallRun) -> None:
    assert load_run(small_run.config, (f'validation_resolution="{said}"',)).config.sample_sizes_px == sizes


@pytest.mark.parametrize("said", ["64,", "64,large", "64x96x32", "60,64", "", "64,0x64"])
def test_sizes_that_cannot_be_made_are_refused(said: str, small_run: SmallRun) -> None:
    with pytest.raises(ConfigError, match="validation_resolution"):
        load_run(small_run.config, (f'validation_resolution="{said}"',))


def test_a_run_that_is_alive_is_not_called_left_behind(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def while_it_is_made(work: WorkDir) -> Summary:
        other = materialise(tmp_path, Request("stage1_lora", 1, {"seed": 2}, {}), lambda work: summary_of())
        return summary_of(beside=other.fingerprint)

    materialise(tmp_path, Request("stage1_lora", 1, {"seed": 1}, {}), while_it_is_made)
    assert "not continued" not in caplog.text


def test_what_a_kill_left_half_written_is_passed_over(tmp_path: Path) -> None:
    """Such a file has the name of a process that is gone, so no later one replaces it."""
    folder = tmp_path / "validation" / "step-00000005"
    folder.mkdir(parents=True)
    Image.new("RGB", (64, 64)).save(folder / "000.png")
    (folder / ".tmp-host-1-001.png").write_bytes(b"half")
    (tmp_path / ".validation").mkdir()
    write_note(tmp_path / ".validation" / "00000005.json", json.dumps([vars(row) for row in losses(1)]).encode())
    (tmp_path / ".validation" / ".tmp-host-1-00000010.json").write_text("[")
    means = write_validations(losses(2), 1, [SampleSpec("a star", 0, (64, 64))], tmp_path)
    assert means == [(5, mean_loss(losses(1)))]
    assert pq.read_table(tmp_path / "validation.parquet").num_rows == 2 * len(losses(1))


def test_the_pictures_called_seen_are_those_that_are_trained_on_first() -> None:
    order = BatchOrder((((2, 2), 1000),), 1, seed=3)
    first = [int(order.batch(number)[1][0]) for number in range(2)]
    rows = SimpleNamespace(
        take=lambda size, numbers: SimpleNamespace(
            pixels=torch.zeros(1, 2, 2, 3), caption_ids=["c"], rows=numbers, pairs=None
        ),
        image_ids=lambda batch: [str(number) for number in batch.rows],
    )
    no_eval = cast(Artifact, SimpleNamespace(manifest=SimpleNamespace(files=()), path=Path()))
    found = grid_pictures(no_eval, cast(TrainingRows, rows), cast(MixedOrder, order), 1)
    assert [(item.part, item.image_id) for item in found] == [(SEEN, str(number)) for number in first]
