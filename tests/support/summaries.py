"""Summaries of artifacts that no room of the product makes."""

from typing import Any

from pydantic import ConfigDict

from deepfloyd_core.store.manifest import Summary


class _Any(Summary):
    model_config = ConfigDict(extra="allow")


def summary_of(**values: Any) -> Summary:
    """One with these values, which are plain JSON."""
    return _Any(**values)
