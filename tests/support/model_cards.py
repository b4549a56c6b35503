"""What a user does with a finished run: the code of its model card, and pictures of a version."""

from contextlib import chdir
from pathlib import Path
from typing import Any

from PIL import Image
from small_run import SmallRun


def run_card(bundle: Path) -> dict[str, Any]:
    """Run the Python of a bundle's model card as it stands, in the bundle's folder. Returns its names."""
    return run_code((bundle / "README.md").read_text().split("```python")[1].split("```")[0], bundle)


def run_code(code: str, folder: Path) -> dict[str, Any]:
    """Run Python in a folder that holds what was trained; it makes a picture beside the folder, which is removed."""
    names: dict[str, Any] = {}
    with chdir(folder):
        exec(code, names)
    with Image.open(folder.parent / "picture.png") as picture:
        assert picture.size == names["picture"].size
    (folder.parent / "picture.png").unlink()
    return names


def generated(run: SmallRun, *arguments: str) -> bytes:
    """The pixels of the first picture that `deepfloyd generate` makes of a run."""
    made = run.call_here("generate", str(run.config), "--prompt", "a purple star", *arguments)
    assert made.returncode == 0, made.stderr
    with Image.open(made.stdout.splitlines()[0]) as picture:
        return picture.tobytes()
