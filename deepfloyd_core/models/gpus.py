"""How many GPUs torch can use here, found in a child process: torch takes a second to import, and its drivers stay out."""

import sys

from deepfloyd_core.errors import JobError
from deepfloyd_core.processes.aside import ask


def gpu_count() -> int:
    """The number of GPUs. Raises JobError if torch does not tell."""
    answer = ask("torch", __name__)
    if not answer.isdigit():
        raise JobError(f"torch told no number of GPUs: {answer[:200]!r}")
    return int(answer)


if __name__ == "__main__":
    import torch

    sys.stdout.write(f"{torch.cuda.device_count()}\n")
