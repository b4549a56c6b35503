"""The photographs inside the installed scikit-image and scikit-learn, as Pillow alone reads them."""

import io
from importlib.metadata import distribution
from pathlib import Path

from narrowing import known
from PIL import Image, ImageCms, ImageOps

SOURCES = {  # not imported: that takes longer than to read them
    "skimage": Path(str(distribution("scikit-image").locate_file("skimage/data"))),
    "sklearn": Path(str(distribution("scikit-learn").locate_file("sklearn/datasets/images"))),
}
SUFFIXES = {".png", ".jpg", ".gif", ".tif"}


def photographs() -> dict[str, Path]:
    found = {f"{name}/{path.name}": path for name, folder in SOURCES.items() for path in sorted(folder.iterdir())}
    return {name: path for name, path in found.items() if path.suffix in SUFFIXES}


def upright_rgb(path: Path) -> Image.Image:
    """A photograph as Pillow alone gives it: upright, alpha on white, sRGB."""
    opened = Image.open(path)
    profile = opened.info.get("icc_profile")
    picture = ImageOps.exif_transpose(opened)
    if "A" in picture.getbands() or "transparency" in picture.info:
        ground = Image.new("RGBA", picture.size, "white")
        return Image.alpha_composite(ground, picture.convert("RGBA")).convert("RGB")
    if profile:  # page.png is gray with a printer's dot gain, rocket.jpg is Adobe RGB
        source, target = ImageCms.ImageCmsProfile(io.BytesIO(profile)), ImageCms.createProfile("sRGB")
        return known(ImageCms.profileToProfile(picture, source, target, ImageCms.Intent.RELATIVE_COLORIMETRIC, "RGB"))
    return picture.convert("RGB")
