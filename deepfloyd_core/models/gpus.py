"""The GPUs that torch can use here, found in a child process: torch takes a second to import, and its drivers stay out."""

import json
import sys

from deepfloyd_core.errors import JobError
from deepfloyd_core.processes.aside import ask


def gpu_count() -> int:
    """The number of GPUs. Raises JobError if torch does not tell."""
    return len(gpu_ids())


def gpu_ids() -> list[str]:
    """The lasting id of each GPU, by the number that torch gives it here. Raises JobError if torch does not tell."""
    answer = ask("torch", __name__)
    try:
        return [str(found) for found in json.loads(answer)]
    except ValueError:
        raise JobError(f"torch told no GPUs: {answer[:200]!r}") from None


if __name__ == "__main__":
    import torch

    found = [str(torch.cuda.get_device_properties(number).uuid) for number in range(torch.cuda.device_count())]
    sys.stdout.write(json.dumps(found) + "\n")
