"""What the steps of a run cost: records that are known, and others calculated in processes of their own."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from pydantic import ValidationError

from deepfloyd_core.config.stages import Stage
from deepfloyd_core.errors import JobError
from deepfloyd_core.processes.aside import ask
from deepfloyd_core.training.costs import CostRequest, StepCosts, default_cache, keep_costs, known_costs

_CALCULATED_BY = "deepfloyd_core.training.measured_costs"


def costs_of(
    requests: dict[Stage, CostRequest], calculates: bool, kept_in: Path | None = None
) -> tuple[dict[Stage, StepCosts], list[str]]:
    """The record of each stage's step, and notes on those that there are not. calculates: also the unknown ones, which
    takes some 8 s and is then kept.
    """
    kept_in = kept_in or default_cache()
    known = {stage: known_costs(request, kept_in) for stage, request in requests.items()}
    found = {stage: costs for stage, costs in known.items() if costs is not None}
    missing = {stage: request for stage, request in requests.items() if stage not in found}
    notes = []
    if missing and not calculates:
        return found, ["the memory of a step is not known yet: `deepfloyd plan` calculates it"]
    with ThreadPoolExecutor(len(missing) or 1) as pool:
        asked = {stage: pool.submit(_calculated, stage, request) for stage, request in missing.items()}
    for stage, request in missing.items():
        try:
            found[stage] = asked[stage].result()
        except JobError as error:
            notes.append(f"{error}: its memory is not known")
        else:
            keep_costs(request, found[stage], kept_in)
    return {stage: found[stage] for stage in requests if stage in found}, notes


def _calculated(stage: Stage, request: CostRequest) -> StepCosts:
    what = f"the calculation of stage {stage}'s step"
    answer = ask(what, _CALCULATED_BY, request.model_dump_json())
    try:
        return StepCosts.model_validate_json(answer)
    except ValidationError:
        raise JobError(f"{what} told nothing of use: {answer.strip()[:200]!r}") from None
