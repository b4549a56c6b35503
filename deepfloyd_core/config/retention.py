"""How long a workspace keeps what no run needs any more: the options of `deepfloyd gc`."""

from pydantic import Field

from deepfloyd_core.config.base import Spec

MOST_VERSIONS, MOST_DAYS = 10_000, 36_500
VERSIONS_HELP = "How many of the last versions of each run file stay, with everything they were made from."
DAYS_HELP = "How many days anything else stays after its last change."


class Policy(Spec):
    """How much stays. The champion and the version before it always do."""

    keep_versions: int = Field(default=5, ge=1, le=MOST_VERSIONS, description=VERSIONS_HELP)
    keep_days: float = Field(default=14, ge=0, le=MOST_DAYS, description=DAYS_HELP)


DEFAULT = Policy()
