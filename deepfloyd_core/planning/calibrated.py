"""How long an artifact takes that nothing of its kind was made of before: by what is computed for it, and by the device.

What models compute is known from the record of their step and from the settings; how long the device takes for it, from a
short calibration (`models.calibration`). What is no model's work has a constant, measured on an idle machine, and is taken
longer as Python's own work takes longer here and now.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from deepfloyd_core.config.run import Run
from deepfloyd_core.config.stage import StageConfig
from deepfloyd_core.config.stages import STAGES, Stage
from deepfloyd_core.models.device import Device
from deepfloyd_core.models.work import Work
from deepfloyd_core.pictures.geometry import Size
from deepfloyd_core.planning.encoding import encoding_s, t5_shape
from deepfloyd_core.planning.steps import StagePlan
from deepfloyd_core.sampling.jobs import PROBED
from deepfloyd_core.training.costs import StepCosts
from deepfloyd_core.training.previews import PICTURES, SEEN_PICTURES, TIMESTEPS, preview_interval
from deepfloyd_core.training.turns import of_a_rank, ranks_of

# Seconds of the machine on which an operation takes _CALL_S, from the demo (benchmarks/plan_times.py).
_CALL_S = 11e-6
_COMMAND_S, _TASK_S = 6.5, 0.5  # a command with a Prefect server of its own, and what a flow does for each artifact
_IMPORTS_S, JOB_S = 5.0, 0.6  # torch and diffusers, once a flow; and a job that loads a model and writes its files
_SET_S = 0.2  # an artifact that no model makes
_JUDGED_S, _CROPPED_S = 0.020, 0.017  # a picture: benchmarks/results.md, of most JPEGs
_HELD_OUT_S = 0.05  # a held-out picture: crops of each stage, kept losslessly
_MEASURED_S = 0.25  # an upscaled picture: its figures, its sheets


def step_s(config: StageConfig, costs: StepCosts, device: Device, ranks: int = 1) -> float:
    """Seconds of an optimizer step of a stage. ranks: processes with a GPU each; on a CPU they share its cores."""
    own = config if device.is_cpu else of_a_rank(config, ranks)
    return device.seconds(costs.step_work(own), config.mixed_precision)


def fixed_s(device: Device, seconds: float) -> float:
    """What Python does in so many seconds on the machine where they were measured; it takes as much longer as an operation
    does.
    """
    return seconds * device.speeds["no"].call_s / _CALL_S


@dataclass(frozen=True)
class Amounts:
    """How much is to be made."""

    files: int  # of all data sets
    pictures: int  # to be judged
    judged_s: float | None  # what that took for the plan; None: it did not judge all of them
    sizes: Mapping[Stage, Size]  # px, of the pictures that the costs of a stage's step are of
    captions: Sequence[str]  # all texts
    new_captions: int  # to be encoded
    held_out: int


@dataclass(frozen=True)
class Calibrated:
    """What is known of a run and its device."""

    run: Run
    stages: Mapping[str, StagePlan]  # by table
    costs: Mapping[Stage, StepCosts]
    amounts: Amounts
    device: Device

    def seconds(self, kind: str) -> float | None:
        """Of an artifact; None: not known."""
        table, _, part = kind.partition("_")
        plan, amounts = self.stages.get(table), self.amounts
        if kind == "image_index":
            return amounts.judged_s or self.fixed(_SET_S + amounts.pictures * _JUDGED_S)
        if kind == "lora_bundle":
            return self.fixed(_SET_S)
        if kind in ("eval_set", "eval_conditioning"):
            return self.fixed(_SET_S + amounts.held_out * _HELD_OUT_S)
        if kind == "text_embeds":
            encoded = encoding_s(self.run, amounts.captions, amounts.new_captions, self.device)
            return self.fixed(_IMPORTS_S + JOB_S) + encoded
        if kind == "cascade_samples":
            return self._samples_s() if self.costs else None
        if plan is None:
            return None
        if part in ("pixels", "conditioning"):
            return self.fixed(_SET_S + sum(count.pictures for count in plan.crops) * _CROPPED_S)
        return self._of_model(part, plan)

    def fixed(self, seconds: float) -> float:
        return fixed_s(self.device, seconds)

    def start_s(self, artifacts: int) -> float:
        """Of a command that makes so many artifacts, beside them."""
        return self.fixed(_COMMAND_S + artifacts * _TASK_S)

    def _of_model(self, part: str, plan: StagePlan) -> float | None:
        config, costs = self.run.config.stage(plan.stage), self.costs.get(plan.stage)
        if part == "text":
            width, length = t5_shape(self.run)["d_model"], self.run.config.tokenizer_max_length
            flops = 2 * length * width**2 * len(self.amounts.captions)
            return self.fixed(_SET_S) + self._took(plan.stage, Work(flops=flops))
        if costs is None:
            return None
        if part == "lora":
            ranks = ranks_of(self.run.config, plan.stage, self.device.gpus)
            steps_s = plan.steps * step_s(config, costs, self.device, ranks)
            return self.fixed(JOB_S) + steps_s + self._validations_s(plan)
        source = STAGES[plan.stage].upscales
        if part != "low_res" or source is None or source not in self.costs:
            return None
        share = config.low_res_stage1_strength
        return self.fixed(JOB_S) + share * self._drawn_s(source, plan.rows, STAGES[source].size_px ** 2)

    def _validations_s(self, plan: StagePlan) -> float:
        """The losses on fixed draws at the end, of the base too, and what is sampled meanwhile."""
        stage, config = plan.stage, self.run.config.stage(plan.stage)
        grid = (self.amounts.held_out + SEEN_PICTURES) * len(TIMESTEPS)
        losses = grid * self._took(stage, self._call(stage, 1, STAGES[stage].size_px ** 2))
        interval = config.validation_step_interval or preview_interval(self.run, stage)
        if not interval:
            return 2 * losses
        is_asked = bool(config.validation_step_interval)
        times = (plan.steps - 1) // interval + is_asked  # also at step 0
        count = self._pictures(stage) if is_asked else min(PICTURES, self._pictures(stage))
        pictures = self._drawn_s(stage, count, STAGES[stage].size_px ** 2)
        return (2 + times) * losses + (times + is_asked) * pictures

    def _pictures(self, stage: Stage) -> int:
        """Of a validation."""
        config = self.run.config
        if STAGES[stage].is_upscaler:
            return min(config.num_upscaled_images, self.amounts.held_out)
        return config.num_validation_images * max(1, len(config.prompts)) * len(config.sample_sizes_px)

    def _samples_s(self) -> float:
        """The samples of base and tuned model, the probes of what was forgotten, and the upscaler's measures."""
        config, total = self.run.config, 0.0
        sizes = [width * height for width, height in config.sample_sizes_px]
        each = config.num_validation_images * max(1, len(config.prompts))
        for stage in self.costs:
            kind, settings = STAGES[stage], config.stage(stage)
            total += 2 * self.fixed(JOB_S)
            if not kind.is_upscaler:
                total += 2 * sum(self._drawn_s(stage, each, area) for area in sizes) + self._probes_s(stage)
                continue
            levels, area = len(settings.measured_noise_levels), kind.size_px**2
            first = min(each * len(sizes), config.num_upscaled_images) if len(self.costs) > 1 else 0
            held_out = 2 * self.amounts.held_out * (levels + settings.degrades_low_res)
            drawn = first * (2 * levels + 1) + held_out
            total += self._drawn_s(stage, drawn, area) + self.fixed(drawn * _MEASURED_S)
        return total

    def _probes_s(self, stage: Stage) -> float:
        """Drawn by the base in few steps, and measured with both models at some timesteps."""
        calls: int = PROBED["steps"] + 2 * len(PROBED["t"])
        work = self._call(stage, len(self.run.config.probes), STAGES[stage].size_px ** 2)
        return self._took(stage, work) * calls

    def _drawn_s(self, stage: Stage, pictures: int, area: int) -> float:
        """Of so many pictures of an area in px, in batches."""
        config, most = self.run.config.stage(stage), STAGES[stage].sample_batch
        at_once = 2 if config.validation_guidance > 1 else 1
        batches = [most] * (pictures // most) + ([pictures % most] if pictures % most else [])
        calls = [self._took(stage, self._call(stage, at_once * batch, area)) for batch in batches]
        return config.validation_num_inference_steps * sum(calls)

    def _call(self, stage: Stage, pictures: int, area: int) -> Work:
        """A call for so many pictures, which the record knows of another size."""
        width, height = self.amounts.sizes[stage]
        return self.costs[stage].call_work(pictures * area / (width * height))

    def _took(self, stage: Stage, work: Work) -> float:
        return self.device.seconds(work, self.run.config.stage(stage).mixed_precision)
