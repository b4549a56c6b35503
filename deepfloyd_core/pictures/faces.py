"""Finds the face in a picture, with OpenCV's cascade of frontal faces, once, while the index is made.

The box becomes a column of the index, so that crops are planned from the index alone, on any machine and in any order.
Of OpenCV's cascades `alt2` is used: on the photographs of scikit-image it finds the one face and nothing else; the
default cascade also takes coins and cells for faces. 0.3 s a picture.
"""

import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from PIL import Image

CASCADE = "haarcascade_frontalface_alt2.xml"
DETECT_PX = 640  # the longer edge at which faces are looked for
MIN_SHARE = 1 / 16  # of the longer edge: smaller finds are noise


def missing_detector() -> str:
    """What is missing for the detection of faces and how to install it; empty when nothing is. Imports nothing heavy."""
    if importlib.util.find_spec("cv2") is None:
        return "OpenCV is not installed. Install the extra: pip install 'deepfloyd-pipeline[face]'."
    if not _cascade().is_file():
        return "this OpenCV has no cascades (version 5 dropped them). pip install 'opencv-python-headless<5'."
    return ""


def find_face(picture: "Image.Image") -> list[int] | None:
    """The largest face of an upright RGB picture: [left, top, width, height] in its pixels; None when there is none."""
    import cv2
    import numpy as np

    cv2.setNumThreads(1)  # its own threads would find the same boxes in another order
    classifier = cv2.CascadeClassifier(str(_cascade()))
    scale = min(1.0, DETECT_PX / max(picture.size))
    size = max(1, round(picture.width * scale)), max(1, round(picture.height * scale))
    gray = np.asarray(picture.convert("L").resize(size))
    edge = max(16, round(max(size) * MIN_SHARE))
    boxes = [tuple(int(n) for n in box) for box in classifier.detectMultiScale(gray, 1.1, 5, minSize=(edge, edge))]
    if not boxes:
        return None
    left, top, width, height = max(boxes, key=lambda box: (box[2] * box[3], box))
    x, y = picture.width / size[0], picture.height / size[1]
    return [round(left * x), round(top * y), round(width * x), round(height * y)]


def _cascade() -> Path:
    found = importlib.util.find_spec("cv2")
    places = (found.submodule_search_locations or []) if found else []
    return Path(*list(places)[:1], "data", CASCADE)
