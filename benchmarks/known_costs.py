"""Calculate the shipped records of what training steps cost: `python benchmarks/known_costs.py`, some 15 minutes.

Writes `deepfloyd_core/training/known_costs.json`, which `deepfloyd plan` reads in place of calculating for seconds: steps of
the run files in `flows/configs`, and of each published flavour with a LoRA on the default layers. A record depends on
shapes alone, so it is the same on every machine; a test calculates some of them again.
"""

import json
from collections.abc import Iterator
from pathlib import Path

from deepfloyd_core.config.flavours import PUBLISHED
from deepfloyd_core.config.run_reader import read_written
from deepfloyd_core.config.stage import StageConfig
from deepfloyd_core.config.stages import STAGES
from deepfloyd_core.models.folders import folder_here
from deepfloyd_core.training import costs
from deepfloyd_core.training.costs import CostRequest, cost_key, cost_request
from deepfloyd_core.training.measured_costs import step_costs

ROOT = Path(__file__).parents[1]
RANKS = (8, 16, 32)


def settings() -> Iterator[tuple[StageConfig, int]]:
    """Each stage's settings, and the edge that is trained on, px."""
    for file in sorted((ROOT / "flows" / "configs").glob("*.toml")):
        _, config, _ = read_written(file, ())
        assert config is not None, file
        for stage in config.stages:
            one = config.stage(stage)
            yield one, one.stage2_patch or STAGES[stage].size_px
    for flavour in PUBLISHED.values():
        windows = (128,) if flavour.kind.is_upscaler else ()
        for precision in ("bf16", "no"):
            for rank in RANKS:
                keys = {"model_flavour": flavour.name, "mixed_precision": precision, "lora_rank": rank}
                for edge in (flavour.kind.size_px, *windows):
                    yield StageConfig.model_validate(keys), edge


def requests() -> Iterator[CostRequest]:
    """Of all that are shipped."""
    for config, edge in settings():
        here = folder_here(config.model, config.flavour.stage)
        request = cost_request(config, here, (edge, edge))
        assert request is not None
        yield request


def main() -> None:
    """Write the file."""
    records: dict[str, object] = {}
    for request in requests():
        if (key := cost_key(request)) not in records:
            records[key] = step_costs(request).record
            print(key, request.settings.model_flavour, request.size, flush=True)
    lines = (f'"{key}": {json.dumps(record)}' for key, record in sorted(records.items()))
    file = Path(costs.__file__).with_name(costs.KNOWN)
    file.write_text("{\n" + ",\n".join(lines) + "\n}\n")


if __name__ == "__main__":
    main()
