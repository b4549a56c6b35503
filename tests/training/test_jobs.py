"""Requests of jobs: what a job reads from the request file is what it was asked."""

from pathlib import Path
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt, MinLen
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import to_json

from deepfloyd_core.config.base import Spec
from deepfloyd_core.config.run_machine import Machine
from deepfloyd_core.config.run_validation import ValidationKeys
from deepfloyd_core.config.stage import StageConfig
from deepfloyd_core.config.stages import STAGES, Stage
from deepfloyd_core.sampling.jobs import Cascade, Probes, SampledStage, SampleInputs, SampleRequest
from deepfloyd_core.store.artifacts import Artifact
from deepfloyd_core.store.pinned import PinnedFile
from deepfloyd_core.training.jobs import TrainingInputs, TrainRequest
from deepfloyd_core.training.mixing import Share

TEXT = st.text(max_size=20)
PATHS = st.text(min_size=1, max_size=20).filter(lambda name: "\0" not in name).map(Path)
FLAVOURS: dict[Stage, str] = {1: "tiny-i", 2: "tiny-ii"}
ARTIFACTS = st.builds(Artifact, st.sampled_from(["eval_set", "text_embeds"]), st.just("0123456789abcdef"), PATHS)
FIXED = ("model_flavour", "dynamo_backend", "attention_mechanism")  # the latter two go by what is installed


def values(annotation: Any, rules: list[Any]) -> st.SearchStrategy[Any]:
    """Those of a field's type within its bounds."""
    origin, parts = get_origin(annotation), get_args(annotation)
    if hasattr(annotation, "__metadata__"):  # Annotated
        inner = [rule for part in parts[1:] for rule in (part.metadata if isinstance(part, FieldInfo) else [part])]
        return values(parts[0], [*rules, *inner])
    if origin is Literal:
        return st.sampled_from(parts)
    if origin in (Union, UnionType):
        return st.one_of(*(values(part, rules) for part in parts))
    if origin is tuple:
        least = next((rule.min_length for rule in rules if isinstance(rule, MinLen)), 0)
        return st.lists(values(parts[0], []), min_size=least, max_size=4).map(tuple)
    if annotation in (int, float):
        return numbers(annotation, rules)
    return {bool: st.booleans(), str: TEXT, type(None): st.none()}[annotation]


def numbers(kind: type, rules: list[Any]) -> st.SearchStrategy[Any]:
    low: Any = next((rule.ge if isinstance(rule, Ge) else rule.gt for rule in rules if isinstance(rule, Ge | Gt)), None)
    high: Any = next(
        (rule.le if isinstance(rule, Le) else rule.lt for rule in rules if isinstance(rule, Le | Lt)), None
    )
    if kind is int:
        open_high = any(isinstance(rule, Lt) for rule in rules)
        return st.integers(low, high - 1 if open_high and high is not None else high)
    return st.floats(
        low, high, allow_nan=False, allow_infinity=False, exclude_min=any(isinstance(rule, Gt) for rule in rules),
        exclude_max=any(isinstance(rule, Lt) for rule in rules),
    )  # fmt: skip


@st.composite
def specs(draw: st.DrawFn, /, model: type[Spec], **fixed: Any) -> Any:
    """A model with a few random settings: of those drawn, the ones that the others let be set."""
    fields = {name: field for name, field in model.model_fields.items() if name not in (*fixed, *FIXED)}
    spec, chosen = model(**fixed), dict(fixed)
    for name in draw(st.lists(st.sampled_from(sorted(fields)), max_size=8, unique=True)):
        tried = chosen | {name: draw(values(fields[name].annotation, fields[name].metadata))}
        try:
            spec, chosen = model(**tried), tried
        except ValidationError:
            continue
    return spec


@st.composite
def train_requests(draw: st.DrawFn) -> TrainRequest:
    stage = draw(st.sampled_from(list(STAGES)))
    shares = st.builds(Share, values(float, [Gt(0)]), values(int, [Ge(0)]), values(int | None, [Ge(1)]))
    optional = st.none() | ARTIFACTS
    return TrainRequest(
        machine=draw(specs(Machine)), stage=stage, settings=draw(specs(StageConfig, model_flavour=FLAVOURS[stage])),
        validation=draw(specs(ValidationKeys)), seed=draw(st.integers()),
        sampling=draw(st.sampled_from(("auto-weighting", "uniform"))),
        shares=draw(st.dictionaries(TEXT, shares, max_size=3)), model=draw(PATHS),
        parent=draw(st.none() | st.builds(PinnedFile, PATHS, TEXT)), prompts=tuple(draw(st.lists(TEXT, max_size=3))),
        inputs=TrainingInputs(
            pixels=draw(ARTIFACTS), text=draw(ARTIFACTS), eval_set=draw(ARTIFACTS), conditioning=draw(optional),
            eval_conditioning=draw(optional), low_res=draw(optional),
        ),
    )  # fmt: skip


@st.composite
def sample_requests(draw: st.DrawFn) -> SampleRequest:
    stages = [
        SampledStage(stage=stage, settings=draw(specs(StageConfig, model_flavour=name)), model=draw(PATHS))
        for stage, name in FLAVOURS.items()
    ]
    optional = st.none() | ARTIFACTS
    return SampleRequest(
        probes=Probes(prompts=tuple(draw(st.lists(TEXT, max_size=2))), conditions="c"), machine=draw(specs(Machine)),
        cascade=Cascade(stages=tuple(draw(st.sampled_from((stages, stages[:1], stages[1:]))))),
        validation=draw(specs(ValidationKeys)), prompts=tuple(draw(st.lists(TEXT, max_size=3))),
        inputs=SampleInputs(
            text_embeds=draw(ARTIFACTS), eval_set=draw(ARTIFACTS), stage1_lora=draw(optional), stage2_lora=draw(optional)
        ),
    )  # fmt: skip


@settings(max_examples=75, deadline=None)
@given(request=train_requests() | sample_requests())
def test_a_job_reads_the_request_that_was_written_to_the_last_bit(request: TrainRequest | SampleRequest) -> None:
    assert type(request).model_validate_json(to_json(request)) == request
