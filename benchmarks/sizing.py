"""What 10^6, 10^8 and 10^9 pictures cost: `python benchmarks/sizing.py` prints the tables of docs/scale.md.

Each CPU rate is a figure of benchmarks/results.md, named with the command that measured it; bytes follow from the formats.
No figure was measured on a GPU: there the work is what the product calculates for a step of the shipped architectures
(`known_costs.json`), and its time is that work divided by a rate that is assumed, and says so.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

from deepfloyd_core.config.stage import StageConfig
from deepfloyd_core.config.stages import STAGES
from deepfloyd_core.models.folders import folder_here
from deepfloyd_core.training.costs import cost_request, default_cache, known_costs

PICTURES = 10**6, 10**8, 10**9
RESULTS = Path(__file__).with_name("results.md")
TOKENS, T5_WIDTH, T5_PARAMETERS = 77, 4096, 4_762_310_656  # rows of a caption; of T5-XXL's encoder
BF16 = 2  # bytes
ASSUMED_FLOPS = 200e12  # a second, of one GPU: half of what data-centre cards reach in bf16 products. Not measured.


@dataclass(frozen=True)
class Rate:
    """A measured figure. row: the text of results.md that has it, so that neither changes alone."""

    value: float
    unit: str
    command: str
    row: str


LISTING = Rate(
    7.7 / 10**6, "CPU s a file", "benchmarks/plan_command.py 1e6", "| a folder, captions from names | 9.7 | 7.7 |"
)
INDEX = Rate(0.01001, "CPU s a picture", "benchmarks/twins.py --pictures 60", "| JPEG 4:2:0 | 9.81 ms | 0.20 ms |")
CROP_64 = Rate(1 / 77.9, "CPU s a picture", "benchmarks/pictures.py --count 100", "| all JPEGs | 80 | 77.9 ±0 % |")
CROP_256 = Rate(
    1 / 53.2, "CPU s a picture", "benchmarks/pictures.py --count 40 --edges 256", "| all JPEGs | 32 | 53.2 ±0 % |"
)
PLAN = Rate(54.7 / 10**7, "CPU s a row", "benchmarks/plan_rows.py 1e7", "plan   10000000 pictures    54.7 s")
T5_CPU = Rate(
    15.7, "CPU s a caption", "benchmarks/embed_xxl.py --run", "| as a whole | 9.89 | 1.11 | 114 | 78 | 15.7 |"
)
STAGE_TEXT = Rate(119_846, "bytes a caption", "benchmarks/projected.py", "(119,846 in the file)")
RATES = {
    "listing of a folder": LISTING, "index of a JPEG": INDEX, "crop of 64 px from a JPEG": CROP_64,
    "crop of 256 px from a JPEG": CROP_256, "plan": PLAN,
    "T5-XXL on a CPU": T5_CPU, "stored text of IF-I-M": STAGE_TEXT,
}  # fmt: skip


def step_flops(flavour: str) -> float:
    """Operations of a training step, for each picture: forward and backward pass of a LoRA of rank 16 in bf16."""
    config = StageConfig.model_validate({"model_flavour": flavour, "mixed_precision": "bf16", "lora_rank": 16})
    edge = STAGES[config.flavour.stage].size_px
    request = cost_request(config, folder_here(config.model, config.flavour.stage), (edge, edge))
    costs = None if request is None else known_costs(request, default_cache())
    if costs is None:
        sys.exit(f"known_costs.json has no record of {flavour}: run benchmarks/known_costs.py")
    return costs.kept_work[0].flops


def hours(seconds: float) -> str:
    """Seconds as hours, or as years of one core beyond 10,000 h."""
    if seconds >= 3.6e7:
        return f"{seconds / 3.15576e7:,.0f} years"
    return f"{seconds / 3600:,.{0 if seconds >= 36_000 else 1}f} h"


def sized(size: float) -> str:
    """Bytes with three digits."""
    for unit in ("B", "kB", "MB", "GB", "TB", "PB"):
        if size < 1000 or unit == "PB":
            break
        size /= 1000
    return f"{size:.3g} {unit}"


def figure(value: float) -> str:
    """A rate with three digits, without powers of ten where it is large."""
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"


def rows(n: int) -> dict[str, str]:
    """Every line of the table, for n pictures with as many captions."""
    index_s, both = n * (LISTING.value + INDEX.value), n * (CROP_64.value + CROP_256.value + 2 * PLAN.value)
    t5 = 2 * T5_PARAMETERS * TOKENS
    steps = {flavour: step_flops(flavour) for flavour in ("i-medium-400m", "i-xlarge-4.3b", "ii-medium-450m")}
    return {
        "requests of a table of URLs": f"{n:,}",
        "requests of a bucket: hash, judge, crop for each stage": f"{4 * n:,}",
        "CPU: listing and index": hours(index_s),
        "CPU: plan and crops of both stages": hours(both),
        "index and crops on 64 cores": hours((index_s + both) / 64),
        "bytes of Stage I's crops, 64 px": sized(n * 64 * 64 * 3),
        "bytes of Stage II's crops, 256 px": sized(n * 256 * 256 * 3),
        "bytes of T5's embeds": sized(n * TOKENS * T5_WIDTH * BF16),
        "bytes of the stored text of IF-I-M": sized(n * STAGE_TEXT.value),
        "CPU: T5-XXL": hours(n * T5_CPU.value),
        "GPU, assumed: T5-XXL": hours(n * t5 / ASSUMED_FLOPS),
        **{f"GPU, assumed: one pass, {name}": hours(n * flops / ASSUMED_FLOPS) for name, flops in steps.items()},
    }


def check(results: str) -> None:
    """End with a message where a rate's row is no longer in results.md."""
    if lost := [name for name, rate in RATES.items() if rate.row not in results]:
        sys.exit(f"{RESULTS.name} no longer has the rows of: {', '.join(lost)}")


def tables() -> str:
    """Both tables, as Markdown."""
    check(RESULTS.read_text(encoding="utf-8"))
    columns = [rows(n) for n in PICTURES]
    lines = ["| pictures, each with a caption of its own | 10^6 | 10^8 | 10^9 |", "|---|--:|--:|--:|"]
    lines += [f"| {name} | " + " | ".join(column[name] for column in columns) + " |" for name in columns[0]]
    lines += ["", "| measured | | by |", "|---|--:|---|"]
    lines += [f"| {name} | {figure(rate.value)} {rate.unit} | `{rate.command}` |" for name, rate in RATES.items()]
    lines += ["", "| calculated | operations |", "|---|--:|"]
    lines += [f"| a caption of {TOKENS} tokens through T5-XXL's encoder | {2 * T5_PARAMETERS * TOKENS:.3g} |"]
    names = ("i-medium-400m", "i-xlarge-4.3b", "ii-medium-450m")
    lines += [f"| a training step of {name}, for each picture | {step_flops(name):.3g} |" for name in names]
    lines += ["", f"Assumed, not measured: {ASSUMED_FLOPS / 1e12:.0f} TFLOP/s of one GPU."]
    return "\n".join(lines)


if __name__ == "__main__":
    print(tables())
