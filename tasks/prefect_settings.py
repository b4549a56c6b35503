"""Other settings of Prefect for a block, in 0.1 ms.

Prefect's `temporary_settings` reads the environment and validates all settings again: 60 ms of CPU, for each update of its
UI. The values here are our own, so they are only put in place.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

from pydantic import BaseModel

M = TypeVar("M", bound=BaseModel)


@contextmanager
def changed_settings(changes: Mapping[str, Any]) -> Iterator[None]:
    """In this block Prefect has other settings. changes: by their names in `prefect.settings.Settings`, nested as there."""
    from prefect.context import SettingsContext, get_settings_context

    context = get_settings_context()
    with SettingsContext(profile=context.profile, settings=_changed(context.settings, changes)):
        yield


def _changed(settings: M, changes: Mapping[str, Any]) -> M:
    unknown = changes.keys() - type(settings).model_fields.keys()
    assert not unknown, unknown  # `model_copy` would take them
    parts = {name: getattr(settings, name) for name in changes}
    return settings.model_copy(
        update={
            name: _changed(part, changes[name]) if isinstance(part, BaseModel) else changes[name]
            for name, part in parts.items()
        }
    )
