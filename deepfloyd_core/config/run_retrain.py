"""When `retrain` trains, and from which weights."""

from typing import Literal

from deepfloyd_core.config.base import Spec
from deepfloyd_core.config.keys import CONTENT, LORA, NOTHING, key

_WARM = {"retrain_mode": ("warm",)}


class RetrainKeys(Spec):
    """When `retrain` trains, and from which weights."""

    retrain_min_new_pictures: int = key(
        0,
        ge=0,
        says="`retrain` waits for so many pictures that are new or changed since the version that serves. It does not "
        "wait when a picture was withdrawn or a setting changed.",
        makes=NOTHING,
    )
    retrain_min_days: float = key(
        0,
        ge=0,
        le=3650,
        says="`retrain` waits until the version that serves has done so for this time (days), under the same conditions.",
        makes=NOTHING,
    )
    retrain_mode: Literal["scratch", "warm"] = key(
        "scratch",
        says="What `retrain` starts from: the base model, or (`warm`) the weights of the version that serves. Other "
        "commands always start from the base model.",
        makes=CONTENT,
    )
    warm_new_share: float = key(
        0.5,
        gt=0,
        lt=1,
        says="Share of a warm training's batches with pictures that the version it starts from was not trained on, if "
        "there are any; the others repeat the pictures that it knows.",
        makes=LORA,
        only_with=_WARM,
    )
    honour_removals: Literal["base", "refuse"] = key(
        "base",
        says="What a warm retraining does when a picture that the version's weights were trained on was removed or "
        "changed: start from the base model, or (`refuse`) end with an error that names it.",
        makes=NOTHING,
        only_with=_WARM,
    )
