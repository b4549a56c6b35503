"""What an artifact is made from: a frozen dataclass for each kind, in the room that makes it.

Its fields hold artifacts, or the requests of artifacts that are yet to be made; they are named as manifests name them.
"""

from dataclasses import dataclass, fields
from typing import Generic, TypeVar

from deepfloyd_core.types import Identity

A = TypeVar("A", bound=Identity)


@dataclass(frozen=True, kw_only=True)
class Inputs(Generic[A]):
    """Base of them."""

    @property
    def by_field(self) -> dict[str, A]:
        """The fields that are not None, in their order."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: value for name, value in values.items() if value is not None}

    @property
    def names(self) -> dict[str, str]:
        """The same by name: the inputs of a request."""
        return {field: artifact.name for field, artifact in self.by_field.items()}
