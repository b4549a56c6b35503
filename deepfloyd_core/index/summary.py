"""The summary of an image index."""

from collections.abc import Mapping

from deepfloyd_core.store.manifest import Summary

CaptionCounts = dict[str, dict[int, int]]  # by data set: how many pictures have so many captions


class LedgerCounts(Summary):
    """The rows of a ledger."""

    inputs: int
    accepted: int
    rejected: int
    reasons: Mapping[str, int]  # of the rejected ones, by their reason
    stage1: int  # accepted ones that feed it
    stage2: int
    bytes: int | None = None  # of all files; None: there is none


class IndexSummary(LedgerCounts):
    """The summary of an image index."""

    twin_groups: int  # groups of duplicates
    twins: int  # those in groups, beside the first of each
    judged_now: int  # files
    judged_before: int  # by an older index
    captions_per_picture: Mapping[str, Mapping[int, int]]  # see `CaptionCounts`
    examples: Mapping[str, tuple[str, str]]  # of each reason a file, and what more is known of it
    decode_timeout_s: float
    other_files: Mapping[str, int]  # that are no pictures, by their kind
    rows: Mapping[str, str]  # digest of the rows that each kind of crops is made of
