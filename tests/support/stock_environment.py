"""A virtual environment of a person who has diffusers and not this package."""

import re
import subprocess
import sys
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path

# What a model card's code needs, beside what these need themselves.
STOCK = (
    "torch",
    "diffusers",
    "transformers",
    "accelerate",
    "peft",
    "sentencepiece",
    "protobuf",
    "ftfy",
    "beautifulsoup4",
)


def stock_environment(folder: Path) -> Path:
    """Make the environment, with links to what is installed here. Returns its Python."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    (packages,) = (folder / "lib").glob("python*/site-packages")
    found: dict[str, Distribution] = {}
    for name in STOCK:
        _add(name, found)
    for one in found.values():
        for file in one.files or ():
            first = Path(file.parts[0])
            if file.parts[0] not in ("..", "__pycache__") and not (packages / first).exists():
                (packages / first).symlink_to(Path(str(one.locate_file(str(first)))))
    return folder / "bin" / "python"


def _add(name: str, found: dict[str, Distribution]) -> None:
    """A distribution and all that it requires on this machine."""
    known = re.sub(r"[-_.]+", "-", name).lower()
    if known in found:
        return
    try:
        found[known] = distribution(name)
    except PackageNotFoundError:  # for other systems
        return
    for requirement in found[known].requires or ():
        required = re.match(r"[\w.-]+", requirement)
        if required and "extra ==" not in requirement:
            _add(required[0], found)
