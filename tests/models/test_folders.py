"""Models from the hub: what a user is told who cannot reach it."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from hub_stand_in import hub_in_place

from deepfloyd_core.config.flavours import FLAVOURS
from deepfloyd_core.models.folders import folder_here, resolve

ASK = (
    "from deepfloyd_core.errors import ModelError\nfrom deepfloyd_core.models.folders import resolve\n"
    "try: resolve('DeepFloyd/IF-I-M-v1.0', 1)\nexcept ModelError as error: print(error)"
)


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ({"HF_ENDPOINT": "http://127.0.0.1:9"}, "and the hub at http://127.0.0.1:9 cannot be reached ("),
        ({"HF_HUB_OFFLINE": "1"}, "and HF_HUB_OFFLINE forbids to download it. Unset that, or point pretrained_model"),
    ],
)
def test_a_hub_that_is_not_reached_is_said_so_and_no_licence_is_blamed(
    setting: dict[str, str], said: str, tmp_path: Path
) -> None:
    unset = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    environment = {**unset, "HF_HOME": str(tmp_path), **setting}
    done = subprocess.run(
        [sys.executable, "-P", "-c", ASK], capture_output=True, text=True, env=environment, timeout=120
    )
    assert said in done.stdout and "lacks unet/config.json" in done.stdout, done.stderr
    assert "licence" not in done.stdout and "Got:" not in done.stdout


CACHE = "hub/models--DeepFloyd--IF-I-M-v1.0"


def cached(home: Path) -> Path:
    """The hub's cache of a model that is there as a whole. Returns its snapshot."""
    snapshot = home / CACHE / "snapshots" / "abc"
    shutil.copytree(FLAVOURS["tiny-i"].repo, snapshot)
    (home / CACHE / "refs").mkdir()
    (home / CACHE / "refs" / "main").write_text("abc")
    return snapshot


@pytest.mark.parametrize(
    ("left", "said"),
    [
        (None, "DeepFloyd/IF-I-M-v1.0 lacks unet/*.safetensors on this machine, and the hub cannot be reached, or"),
        (9, f"/{CACHE}/blobs/5af is truncated to 9 bytes. Remove it and run this again"),
    ],
)  # fmt: skip
def test_what_a_broken_download_left_in_the_cache_is_told_with_what_helps(
    left: int | None, said: str, tmp_path: Path
) -> None:
    file = cached(tmp_path) / "unet/diffusion_pytorch_model.safetensors"
    data = file.read_bytes()
    file.unlink()
    if left:
        (tmp_path / CACHE / "blobs").mkdir()
        (tmp_path / CACHE / "blobs" / "5af").write_bytes(data[:left])
        file.symlink_to("../../../blobs/5af")
    unset = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    environment = {**unset, "HF_HOME": str(tmp_path), "HF_ENDPOINT": "http://127.0.0.1:9"}
    done = subprocess.run(
        [sys.executable, "-P", "-c", ASK], capture_output=True, text=True, env=environment, timeout=120
    )
    assert said in done.stdout, done.stderr
    assert "Put these files there" not in done.stdout, "it is no folder of the user's"


def test_a_model_that_was_downloaded_is_known_to_be_here_without_the_hub(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Also where the repository has files that nobody needs, as most have."""
    tiny = Path(FLAVOURS["tiny-i"].repo)
    with hub_in_place(monkeypatch) as hub:
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
        hub.private = False
        for part in ("unet", "scheduler"):
            hub.files |= {f"{part}/{file.name}": file.read_bytes() for file in (tiny / part).iterdir()}
        hub.files |= {"unet/model.bin": b"a pickle", "readme.md": b"words"}
        assert folder_here("me/model", 1) is None
        folder = resolve("me/model", 1)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    assert folder_here("me/model", 1) == folder and not (folder / "unet" / "model.bin").exists()
    assert folder_here("me/model", 1, text=True) is None
