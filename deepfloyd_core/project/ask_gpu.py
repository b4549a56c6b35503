"""Entry of a child process: writes what torch tells of this machine's GPU as a line of JSON, and imports nothing else."""

import json
import sys


def main() -> None:
    """`kind`: cuda, mps or cpu; of cuda also the name, the memory (bytes) and whether it computes in bf16."""
    import torch

    if torch.cuda.is_available():
        facts = torch.cuda.get_device_properties(0)
        # From Ampere on; torch also emulates bf16 on older cards, many times slower.
        bf16 = bool(torch.version.hip) or facts.major >= 8
        told = {"kind": "cuda", "name": facts.name, "bytes": facts.total_memory, "bf16": bf16}
    else:
        told = {"kind": "mps" if torch.backends.mps.is_available() else "cpu"}
    sys.stdout.write(json.dumps(told))


if __name__ == "__main__":
    main()
