"""The table of stages, and what must hold of each of them elsewhere."""

from dataclasses import fields

import pytest

from deepfloyd_core.bundle.card_code import CALLS, VARIABLES
from deepfloyd_core.bundle.identity import BundleSummary
from deepfloyd_core.config.flavours import PUBLISHED
from deepfloyd_core.config.run import RunConfig
from deepfloyd_core.config.stages import STAGES, UPSCALE, UPSCALERS, Stage, kind_for_edge
from deepfloyd_core.index.identity import FORMAT
from deepfloyd_core.index.ledger import StageReasons, schema
from deepfloyd_core.index.summary import LedgerCounts
from deepfloyd_core.models.random_weights import design_of
from deepfloyd_core.models.text_encoders import TEXT_ENCODERS
from deepfloyd_core.sampling.jobs import CascadeInputs
from deepfloyd_core.sampling.sampler import SAMPLE_FUNCTIONS
from deepfloyd_core.text.encoders import ENCODERS


@pytest.mark.parametrize("stage", STAGES)
def test_everything_that_has_a_field_or_a_function_for_each_stage_has_it_for_this_one(stage: Stage) -> None:
    kind = STAGES[stage]
    assert kind.number == stage and kind.text_encoder in TEXT_ENCODERS
    for model in (RunConfig, BundleSummary, LedgerCounts):
        assert kind.table in model.model_fields, model
    assert f"{kind.table}_reason" in {field.name for field in fields(StageReasons)}
    assert f"{kind.table}_lora" in {field.name for field in fields(CascadeInputs)}
    assert {stage} <= SAMPLE_FUNCTIONS.keys() & CALLS.keys() & VARIABLES.keys()
    assert any(flavour.stage == stage for flavour in PUBLISHED.values())


def test_the_samples_have_room_for_the_figures_of_every_upscaler() -> None:
    """With more upscalers `SamplesSummary` needs figures of each, and `Cascade.upscaler` and its callers go through them."""
    assert len(UPSCALERS) == 1


def test_every_text_encoder_has_its_functions() -> None:
    assert TEXT_ENCODERS.keys() == ENCODERS.keys()


def test_a_stage_upscales_an_earlier_one_whose_sizes_divide_its_own() -> None:
    before: list[Stage] = []
    for stage, kind in STAGES.items():
        if kind.upscales is not None:
            low = STAGES[kind.upscales]
            assert kind.upscales in before
            assert (kind.size_px, kind.alignment_px) == (UPSCALE * low.size_px, UPSCALE * low.alignment_px)
            assert kind.scale == UPSCALE * low.scale and kind.in_channels == 2 * 3
        before.append(stage)


@pytest.mark.parametrize(("edge", "stage"), [(8, 1), (64, 1), (128, 1), (128.5, 2), (512, 2)])
def test_a_size_belongs_to_the_first_stage_that_is_trained_at_it(edge: float, stage: int) -> None:
    assert kind_for_edge(edge).number == stage


def test_a_size_beyond_all_belongs_to_the_last_stage() -> None:
    assert kind_for_edge(2 * max(kind.largest_px for kind in STAGES.values())) is list(STAGES.values())[-1]


def test_stages_are_told_apart_by_the_channels_of_their_unets() -> None:
    """Where two share them, `preflight.unet_sizes.check_unet` must compare another fact of their configurations."""
    assert len({kind.in_channels for kind in STAGES.values()}) == len(STAGES)


@pytest.mark.parametrize("name", PUBLISHED)
def test_every_flavour_has_an_architecture_for_random_weights(name: str) -> None:
    flavour = PUBLISHED[name]
    drawn = design_of(flavour)
    assert drawn.unet["in_channels"] == flavour.kind.in_channels
    assert tuple(drawn.schedulers) == flavour.kind.schedulers and all(drawn.schedulers.values())


def test_other_columns_of_the_ledger_come_with_another_format() -> None:
    """A stage adds one. An index without it would be taken for a finished one: raise `index.identity.FORMAT`."""
    columns = [
        "source", "dataset_id", "status", "reason", "detail", "note", "image_id", "bytes", "format", "width", "height",
        "captions", "face", "stage1_reason", "stage2_reason", "group", "conditioning", "conditioning_id",
    ]  # fmt: skip
    assert (FORMAT, schema(paired=True).names) == (13, columns)
