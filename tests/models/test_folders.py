"""Models from the hub: what a user is told who cannot reach it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

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
    assert said in done.stdout and "this machine lacks unet/config.json" in done.stdout, done.stderr
    assert "licence" not in done.stdout and "Got:" not in done.stdout
