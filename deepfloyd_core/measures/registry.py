"""The table of all measures. A new measure is a module in this room and a row here.

The rows decide the columns of eval.parquet, the means and gains in summaries, their heads, units and directions in reports
and model cards, and the identity of the measured samples.
"""

from pathlib import Path

from deepfloyd_core.config.run_validation import ValidationKeys
from deepfloyd_core.measures.clip import CLIP
from deepfloyd_core.measures.lpips import LPIPS
from deepfloyd_core.measures.measure import Against, Measure, Network
from deepfloyd_core.measures.pixel import colour_shift, colour_spread, detail_energy, psnr, ssim

MEASURES = (
    Measure(
        "psnr", "PSNR to the truth", "dB", "more", head="PSNR", gains=True,
        compute=lambda it: psnr(it.picture.pixels, it.reference.pixels),
    ),
    Measure(
        "ssim", "SSIM to the truth", "at most 1", "more", head="SSIM", gains=True,
        compute=lambda it: ssim(it.picture.pixels, it.reference.pixels),
    ),
    Measure(
        "consistency", "PSNR of its downscale to the low-res picture", "dB", "more",
        compute=lambda it: psnr(it.picture.downscale, it.low_res),
    ),
    Measure(
        "consistency", "PSNR of its downscale to the sample", "dB", "more", against="sample", gains=True,
        compute=lambda it: psnr(it.picture.downscale, it.low_res),
    ),
    Measure(
        "detail", "detail as a multiple of the truth's", reading="1 is best: less is blurred, more is noise",
        share=("detail", "true_detail"), compute=lambda it: (it.picture.detail, it.reference.detail),
    ),
    Measure(
        "detail_share", "detail as a share of its own energy", "0 to 1",
        reading="neither way is better: little is blurred, much is noise", against="sample", share=("detail", "energy"),
        compute=lambda it: (it.picture.detail, detail_energy(it.picture.pixels, it.picture.pixels.mean((0, 1)))),
    ),
    Measure(
        "colour_shift", "difference in mean colour from the truth", "levels of 255", "less",
        compute=lambda it: colour_shift(it.picture.pixels, it.reference.pixels),
    ),
    Measure(
        "colour_shift", "difference in mean colour from the sample", "levels of 255", "less", against="sample",
        compute=lambda it: colour_shift(it.picture.pixels, it.reference.pixels),
    ),
    # Of downscales: fine detail, which has a measure of its own, would add to the spread.
    Measure(
        "colour_spread", "difference in the spread of colour from the low-res picture", "levels of 255", "less",
        compute=lambda it: colour_spread(it.picture.downscale, it.low_res),
    ),
    Measure(
        "colour_spread", "difference in the spread of colour from the sample", "levels of 255", "less", against="sample",
        compute=lambda it: colour_spread(it.picture.downscale, it.low_res),
    ),
    Measure("clip", "CLIP similarity to the truth", "at most 1", "more", head="CLIP", gains=True, network=CLIP),
    Measure("clip_distance", "CLIP distance of the set to the truths' set", better="less", of="set", network=CLIP),
    Measure("lpips", "LPIPS distance to the truth", better="less", head="LPIPS", gains=True, network=LPIPS),
)  # fmt: skip
COLUMNS = tuple(dict.fromkeys(column for measure in MEASURES for column in measure.columns))  # of eval.parquet
NETWORKS: tuple[Network, ...] = tuple(dict.fromkeys(measure.network for measure in MEASURES if measure.network))


def measures_against(against: Against) -> tuple[Measure, ...]:
    """The measures of held-out pictures, which have a ground truth, or of Stage I's samples, in the order of reports."""
    return tuple(measure for measure in MEASURES if measure.against == against)


def networks_of(config: ValidationKeys) -> list[tuple[Network, Path]]:
    """The networks for which a run file names weights, and the paths of these."""
    paths = {network: getattr(config, network.key) for network in NETWORKS}
    return [(network, Path(path)) for network, path in paths.items() if path is not None]
