"""Where and how a run computes. None of these keys changes a byte of an artifact, so none is in an identity."""

from typing import Annotated, Literal

from pydantic import Field

from deepfloyd_core.config.base import HomePath, Spec
from deepfloyd_core.config.keys import NOTHING, key


class Machine(Spec):
    """Where and how a run computes."""

    workers: int = key(
        2, ge=1, le=256, says="Shards prepared in parallel; a cluster with an address ignores it.", makes=NOTHING
    )
    task_runner: Literal["threads", "processes", "ray", "dask"] = key(
        "threads",
        says="Where shards are made. `threads` start at once and use 2 to 4 cores; `processes` use any number. `ray` "
        "and `dask` also make embeds and samples.",
        makes=NOTHING,
    )
    task_runner_address: str | None = key(
        None,
        says="Address of the Ray or Dask cluster; unset: one of `workers` on this machine, for the run.",
        makes=NOTHING,
    )
    embed_batch_size: int = key(16, ge=1, le=4096, says="Captions in one forward pass of T5.", makes=NOTHING)
    embed_workers: int = key(
        1,
        ge=1,
        le=64,
        says="Processes that encode in parallel, each with its own T5, and its own GPU if there are any; on Ray and Dask as "
        "many tasks.",
        makes=NOTHING,
    )
    sample_workers: int = key(
        1,
        ge=1,
        le=64,
        says="Processes that draw samples and pictures in parallel, each with its own models, and its own GPU if there are "
        "any; on Ray and Dask as many tasks.",
        makes=NOTHING,
    )
    text_encoder_streaming: bool = key(
        False,
        says="Load T5 layer by layer: one layer is on the device at a time, reloaded for every file of embeds.",
        makes=NOTHING,
    )
    report_to: Literal["none", "tensorboard", "wandb", "tensorboard,wandb"] = key(
        "none",
        says="Trackers that also log every training step: `tensorboard`, a folder in the workspace; `wandb`, "
        "Weights & Biases, with a key or WANDB_MODE=offline in the environment.",
        makes=NOTHING,
    )
    auto_fit: bool = key(
        False,
        says="Where a part of the run does not fit the device's memory, set what changes no result, or by the rounding of "
        "sums at most: micro_batch_size, gradient_checkpointing, sample_batch_size, text_encoder_streaming. What would "
        "change it is only proposed.",
        makes=NOTHING,
    )
    num_processes: Annotated[int, Field(ge=1, le=64)] | Literal["auto"] = key(
        1,
        says="Processes (ranks) that share each training step, a GPU each if there are any; `auto`: as many as GPUs. They "
        "share out gradient_accumulation_steps, or train_batch_size, evenly. So a step has the same samples for any number, "
        "and the same result up to the rounding of sums; to the byte where 2 processes share 2 accumulated batches.",
        makes=NOTHING,
    )
    exact_ranks: bool = key(
        False,
        says="Sum gradients over the processes in the order of one: its bytes for any number of them, for 2 to 6 times the "
        "time of the sum.",
        makes=NOTHING,
    )
    device: Literal["auto", "cpu", "cuda", "mps"] = key("auto", says="Where models run.", makes=NOTHING)
    num_threads: int | None = key(
        None, ge=1, says="Threads of torch on the CPU; unset: torch's own choice.", makes=NOTHING
    )

    workspace_cache_dir: HomePath | None = key(
        None,
        says="With a workspace in a bucket, the folder for what is in use of it here; unset: "
        "~/.cache/deepfloyd/workspaces, where commands that take its URL look, too.",
        makes=NOTHING,
    )
    workspace_cache_gib: float | None = key(
        None,
        gt=0,
        le=1e6,
        says="With a workspace in a bucket, how much of it is kept here (GiB): what was used longest ago goes first, what "
        "a run uses stays. Unset: everything that was used.",
        makes=NOTHING,
    )

    @property
    def on_cluster(self) -> bool:
        """Whether parts of an artifact are made by the workers of a cluster."""
        return self.task_runner in ("ray", "dask")

    def parts(self, workers: int) -> int:
        """How many parts a job has for its number of workers; 0: it is done whole, by one process of this machine."""
        return workers if workers > 1 or self.on_cluster else 0

    @property
    def trackers(self) -> tuple[str, ...]:
        """Where a training is shown, beside the flow run."""
        return () if self.report_to == "none" else tuple(self.report_to.split(","))
