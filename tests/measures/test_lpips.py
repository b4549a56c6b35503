"""LPIPS against the measure written out in NumPy, and against its authors' package where that is installed."""

import importlib.util
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from lpips_models import lpips_by_hand, save_lpips
from PIL import Image
from safetensors.numpy import load_file, save_file
from small_run import SmallRun

from deepfloyd_core.diffusion.loss import to_model_range
from deepfloyd_core.errors import ConfigError
from deepfloyd_core.measures.lpips import load_distances
from deepfloyd_core.measures.lpips_weights import check_lpips_file
from deepfloyd_core.preflight.load import load_run

CPU = torch.device("cpu")


def pictures(count: int, width: int, height: int) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    blocks = rng.integers(0, 256, (count, 5, 6, 3), dtype=np.uint8)
    return [np.array(Image.fromarray(block).resize((width, height), Image.Resampling.BICUBIC)) for block in blocks]


@pytest.mark.parametrize(("kind", "width", "height"), [("alex", 96, 67), ("vgg", 40, 32)])
def test_distances_are_those_of_the_measure_written_out(kind: str, width: int, height: int, tmp_path: Path) -> None:
    """Odd edges too, of which pooling leaves some out."""
    file = save_lpips(tmp_path / "weights.safetensors", kind)
    check_lpips_file(file)
    truth, *others = pictures(3, width, height)
    found = load_distances(file, CPU)([*others, truth], truth)
    assert found[:2] == pytest.approx([lpips_by_hand(file, kind, other, truth) for other in others], rel=2e-5)
    assert found[2] == 0 and min(found[:2]) > 0.01


@pytest.mark.skipif(
    importlib.util.find_spec("lpips") is None, reason="lpips is not installed: pip install lpips torchvision"
)
@pytest.mark.parametrize("kind", ["alex", "vgg"])
def test_distances_are_those_of_the_authors_package(kind: str, tmp_path: Path) -> None:
    """With its own learned weights, which it ships; its trunk, which it would fetch, is drawn at random."""
    from safetensors.torch import save_model

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it asks torchvision in a way that is no longer liked
        import lpips

        torch.manual_seed(0)
        theirs = lpips.LPIPS(net=kind, pnet_rand=True, verbose=False)
    file = tmp_path / "weights.safetensors"
    save_model(theirs, str(file))
    check_lpips_file(file)
    one, truth = pictures(2, 100, 67)
    with torch.no_grad():
        expected = float(theirs(*(to_model_range(torch.from_numpy(picture)[None]) for picture in (one, truth))))
    assert load_distances(file, CPU)([one], truth) == pytest.approx([expected], rel=1e-5)
    clones = {name: tensor.clone() for name, tensor in theirs.state_dict().items()}
    save_file({name: tensor.numpy() for name, tensor in clones.items()}, file)
    check_lpips_file(file)


def spoil_header(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[20] ^= 0xFF
    file.write_bytes(data)


def with_tensors(change: Callable[[dict[str, np.ndarray]], object]) -> Callable[[Path], object]:
    def spoil(file: Path) -> None:
        weights: dict[str, np.ndarray] = load_file(file)
        change(weights)
        save_file(weights, file)

    return spoil


FIRST = "net.slice1.0.weight"


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lambda file: file.unlink(), "there is no such file"),
        (lambda file: file.write_bytes(b""), "cannot be read"),
        (lambda file: file.write_bytes(file.read_bytes()[:-4]), "cannot be read"),
        (spoil_header, "cannot be read"),
        (with_tensors(lambda found: found.pop(FIRST)), rf"{FIRST} is absent: weights of neither"),
        (with_tensors(lambda found: found.update({FIRST: np.zeros((64, 3, 7, 7), np.float32)})), "neither AlexNet nor"),
        (with_tensors(lambda found: found.pop("lin3.model.1.weight")), r"lin3.model.1.weight is absent and should be"),
        (with_tensors(lambda found: found.pop("scaling_layer.scale")), "scaling_layer.scale is absent"),
        (
            with_tensors(lambda found: found.update({"lin5.model.1.weight": np.zeros(1, np.float32)})),
            "should be absent",
        ),
        (
            with_tensors(lambda found: found.update({"net.slice2.3.bias": np.zeros(191, np.float32)})),
            "is .191,. and sho",
        ),
        (
            with_tensors(lambda found: found.update({n: v.astype(np.float16) for n, v in found.items()})),
            "weights in F16;",
        ),
        (with_tensors(lambda found: found["net.slice4.8.bias"].fill(np.nan)), r"net.slice4.8.bias is not finite"),
        (
            with_tensors(lambda found: found.update({"lins.1.model.1.weight": found["lin1.model.1.weight"] * 2})),
            "lins.1.model.1.weight is not lin1",
        ),
    ],
)
def test_a_file_that_holds_no_weights_of_lpips_is_refused(
    tmp_path: Path, spoil: Callable[[Path], object], says: str
) -> None:
    file = save_lpips(tmp_path / "weights.safetensors")
    spoil(file)
    with pytest.raises(ConfigError, match=says) as refused:
        check_lpips_file(file)
    assert str(file) in str(refused.value) and "Or remove the key" in str(refused.value)


def test_a_pickle_is_never_opened(tmp_path: Path) -> None:
    file = tmp_path / "alex.pth"
    file.write_bytes(b"\x80\x04.")
    with pytest.raises(ConfigError, match=r"only .safetensors files are read, never a pickle"):
        check_lpips_file(file)


def test_a_run_that_could_not_use_the_weights_is_refused(small_run: SmallRun, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"eval_lpips_model is .*there is no such file"):
        load_run(small_run.config, (f"eval_lpips_model={tmp_path}/none.safetensors",))
    text = small_run.config.read_text()
    small_run.config.write_text(text[: text.index("[stage2]")])
    with pytest.raises(ConfigError, match=r"eval_lpips_model measures what Stage II makes, and there is no .stage2."):
        load_run(small_run.config, (f"eval_lpips_model={save_lpips(tmp_path / 'w.safetensors')}",))
