"""What a run needs of torch: a build for its device, and how fast it computes in bf16."""

from pathlib import Path
from shlex import quote

from deepfloyd_core.config.run import Run
from deepfloyd_core.doctor.finding import Finding
from deepfloyd_core.models.torch_facts import TorchFacts

AGAIN = "pip install --force-reinstall torch"
_DRIVER = Path("/proc/driver/nvidia/version")
_SLOW = 1.3  # times fp32


def torch_findings(facts: TorchFacts, run: Run | None) -> list[Finding]:
    """The build and device, and the arithmetic of bf16."""
    return [_device_finding(facts, run), _bf16_finding(facts, run)]


def _device_finding(facts: TorchFacts, run: Run | None) -> Finding:
    asked = run.config.device if run else "auto"
    name = f" ({facts.device_name})" if facts.device_name else ""
    text = f"{facts.version}, built for {facts.build}; computes on {facts.device}{name}"
    if asked not in ("auto", "cpu", facts.device):
        return Finding("torch", "fault", f"{text}, and device is {asked!r}", 'in the run file: device = "auto"')
    if facts.device == "cpu":
        text = f"{text} with {facts.threads} threads"
        if _DRIVER.exists() and asked != "cpu":
            return Finding("torch", "note", f"{text}, although a driver of NVIDIA is loaded", AGAIN)
    return Finding("torch", "fine", text)


def _bf16_finding(facts: TorchFacts, run: Run | None) -> Finding:
    on_cpu = facts.device == "cpu" or (run is not None and run.config.device == "cpu")
    if on_cpu:
        times = facts.bf16_times
        text = (
            "not measured" if times is None else f"a convolution takes {times:.1f} times as long as in fp32, on the CPU"
        )
        slow = times is not None and times > _SLOW
    else:
        text = f"{facts.bf16} on this GPU"
        slow = facts.bf16 != "native"
    file, keys = (run.file, _bf16_keys(run)) if run else ("", [])
    if not slow or not keys:
        return Finding("bf16", "fine", text)
    sets = " ".join(f"--set {key}" for key in keys)
    return Finding("bf16", "note", f"{text}, and the run file computes in bf16", f"deepfloyd run {quote(file)} {sets}")


def _bf16_keys(run: Run) -> list[str]:
    """What a run file would set to compute in fp32 where a UNet computes in bf16 now. T5 computes in fp32 by itself where
    that is faster.
    """
    return [f"stage{n}.mixed_precision=no" for n in run.config.stages if run.config.stage(n).mixed_precision == "bf16"]
