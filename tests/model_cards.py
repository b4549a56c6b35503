"""What a user does with a finished run: the code of its model card, and pictures of a version."""

from pathlib import Path
from typing import Any

from PIL import Image


def card_code(bundle: Path) -> str:
    """The Python of a bundle's model card, with the bundle's folder in front of its own files."""
    code = (bundle / "README.md").read_text().split("```python")[1].split("```")[0]
    for stage in (1, 2):
        code = code.replace(f'"stage{stage}', f'"{bundle}/stage{stage}')
    return code


def generated(run: Any, *arguments: str) -> bytes:
    """The pixels of the first picture that `deepfloyd generate` makes of a run."""
    made = run.call_here("generate", str(run.config), "--prompt", "a purple star", *arguments)
    assert made.returncode == 0, made.stderr
    with Image.open(made.stdout.splitlines()[0]) as picture:
        return picture.tobytes()
