"""What a training shows of itself while it is under way: how often it samples when no `validation_step_interval` is set.

Previews are no part of the artifact, so neither they nor what decides them is in its fingerprint: with another
validation prompt nothing is trained anew. Cost is counted in passes of one picture through the UNet; a backward pass costs
about as much as a forward pass, because most weights are frozen. A short training has no previews, a long one has as many
as it can afford. (SimpleTuner validates every 100 steps, whatever that costs.) No torch.
"""

from deepfloyd_core.config.run import Run, RunConfig
from deepfloyd_core.config.stages import STAGES, Stage

PREVIEWS = ".preview"  # the folder of their files, in that of the training
TIMESTEPS = (100, 400, 700, 950)  # of the grid that each validation takes losses on
SEEN_PICTURES = 2  # of that grid, which training has shown; each costs as much as a held-out one
PICTURES = 4  # of a preview, at most
_SHARE, _MOST = 10, 10  # previews cost at most one in so many passes of the training; and are at most so many
_FORWARD_AND_BACKWARD = 2  # passes
_HELD_OUT = 4  # pictures of a data set, where `num_eval_images` is unset


def preview_interval(run: Run, stage: Stage) -> int:
    """Optimizer steps between the previews of a stage's training, whose steps are known; 0: none. The first one is after so
    many steps: samples at step 0 are those of the base.
    """
    config = run.config.stage(stage)
    if config.validation_step_interval is not None:
        return 0
    area = (config.stage2_patch / STAGES[stage].size_px) ** 2 if config.stage2_patch else 1.0  # of a training picture
    training = config.steps * config.samples_per_step * _FORWARD_AND_BACKWARD * area
    held_out = _HELD_OUT if run.config.num_eval_images is None else run.config.num_eval_images
    losses = (held_out + SEEN_PICTURES) * len(TIMESTEPS)
    of_a_picture = config.validation_num_inference_steps * (2 if config.validation_guidance > 1 else 1)
    count = min(_MOST, int(training / _SHARE / (losses + _pictures(run.config, stage) * of_a_picture)))
    return -(-config.steps // (count + 1)) if count else 0


def sampled_together(run: Run, stage: Stage) -> int:
    """The most pictures that a stage's training samples at once, in its validations or previews; 0: it samples none."""
    config = run.config.stage(stage)
    most = config.sampled_at_once if config.validation_step_interval else 0
    if config.validation_step_interval is None and preview_interval(run, stage):
        most = min(PICTURES, config.sampled_at_once)
    return min(most, pictures_of_size(run.config, stage))


def _pictures(run: RunConfig, stage: Stage) -> int:
    """Of a preview; see `sampling.specs.sample_specs`."""
    sizes = 1 if STAGES[stage].is_upscaler or run.stage(stage).controlnet else len(run.sample_sizes_px)
    return min(PICTURES, sizes * pictures_of_size(run, stage))


def pictures_of_size(run: RunConfig, stage: Stage) -> int:
    """How many pictures of one size a stage's validations and samples have."""
    if STAGES[stage].is_upscaler:
        return run.num_upscaled_images
    if run.stage(stage).controlnet:
        return run.num_validation_images
    return run.num_validation_images * max(1, len(run.prompts))
