"""The gate's report on a candidate, as its event stores it: one verdict for each rule and what it was applied to."""

from pydantic import BaseModel, ConfigDict


class Verdict(BaseModel):
    """What a rule says of a candidate."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    rule: str  # its name in GATE_RULES; `start`: where a training started
    about: str  # what it was applied to, e.g. "Stage I"; empty: the whole version
    passed: bool
    reason: str  # a sentence without its full stop
    figure: float | None = None  # that was judged; None: missing, or not finite
    interval: tuple[float, float] | None = None  # 95 %
    limit: float | None = None  # the worst figure that passes


class GateReport(BaseModel):
    """The verdicts on a candidate."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    against: int | None  # the champion then; None: there was none
    verdicts: tuple[Verdict, ...]

    @property
    def passed(self) -> bool:
        """Whether every rule passed; False without any verdict."""
        return bool(self.verdicts) and all(verdict.passed for verdict in self.verdicts)

    @property
    def reasons(self) -> list[str]:
        """Why it did not pass."""
        return [one.reason for one in self.verdicts if not one.passed]
