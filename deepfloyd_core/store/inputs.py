"""The inputs of an artifact: a frozen dataclass for each kind, in the room that makes the artifact.

Its fields hold artifacts, or requests of artifacts that are still to be made. Manifests use the same field names.
"""

from dataclasses import dataclass, fields
from typing import Generic, TypeVar

from deepfloyd_core.types import Identity

A = TypeVar("A", bound=Identity)


@dataclass(frozen=True, kw_only=True)
class Inputs(Generic[A]):
    """Base class of the inputs of each kind."""

    @property
    def by_field(self) -> dict[str, A]:
        """The fields that are not None, in their order."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: value for name, value in values.items() if value is not None}

    @property
    def names(self) -> dict[str, str]:
        """The inputs by field name, as in a request: the artifacts' names."""
        return {field: artifact.name for field, artifact in self.by_field.items()}
