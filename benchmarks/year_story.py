"""The story of the year: what happens to the pictures on each day, and which nights something breaks.

The pictures are drawn (`drawn_world`): purple stars. On most days nothing happens. Some days bring one to three more, some
a better caption, some withdraw one or two. On bad days as many pictures arrive as were there, with the captions of the
others but not their style; whoever brought them takes them away again within three days. All of it follows from a seed.
"""

import io
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image

from deepfloyd_core.measures import drawn_world

FIRST = 24  # pictures at the beginning
BAD_PICTURES = 24
CAPTION, OTHER_CAPTION = "a purple star", "one purple star"
STYLES = ("other shapes", "inverted", "strange")
# Of 1,000 days without a bad batch.
GROWS, CHANGES, SHRINKS = 110, 25, 25
GAP = 4  # days between the arrivals of two bad batches, at least


@dataclass(frozen=True)
class Day:
    """What happens to the folder on a day."""

    added: tuple[int, ...] = ()
    recaptioned: tuple[int, ...] = ()
    withdrawn: tuple[int, ...] = ()
    bad: str = ""  # the style of the batch that arrives
    bad_leaves: bool = False

    @property
    def is_quiet(self) -> bool:
        """Whether nothing happens."""
        return self == Day()

    @property
    def words(self) -> str:
        """For the log."""
        parts = [f"{sign}{len(some)}" for sign, some in (("+", self.added), ("-", self.withdrawn)) if some]
        parts += [f"{len(self.recaptioned)} captions"] * bool(self.recaptioned)
        parts += [f"bad: {self.bad}"] * bool(self.bad) + ["bad ones leave"] * self.bad_leaves
        return ", ".join(parts)


def story(nights: int, bad: int, seed: int) -> list[Day]:
    """A day before each night. The first one brings the first pictures; no bad batch within the first three."""
    rng = np.random.default_rng([seed, 1])
    arrivals = _arrivals(rng, nights, bad)
    leaving = {night + int(rng.integers(1, GAP)) for night in arrivals}
    there, number, days = list(range(FIRST)), FIRST, [Day(added=tuple(range(FIRST)))]
    for night in range(1, nights):
        chance = rng.integers(1000)
        added: tuple[int, ...] = ()
        withdrawn: tuple[int, ...] = ()
        recaptioned: tuple[int, ...] = ()
        if chance < GROWS:
            added = tuple(range(number, number + int(rng.integers(1, 4))))
            number += len(added)
        elif chance < GROWS + SHRINKS:
            withdrawn = tuple(int(one) for one in rng.choice(there, int(rng.integers(1, 3)), replace=False))
        elif chance < GROWS + SHRINKS + CHANGES:
            recaptioned = (int(rng.choice(there)),)
        there = [one for one in (*there, *added) if one not in withdrawn]
        style = STYLES[arrivals.index(night) % len(STYLES)] if night in arrivals else ""
        days.append(Day(added, recaptioned, withdrawn, style, night in leaving))
    return days


def _arrivals(rng: np.random.Generator, nights: int, bad: int) -> list[int]:
    """Nights before which a bad batch arrives, at least GAP apart. Raises ValueError when there are too few nights."""
    room = nights - 3 - bad * (GAP - 1)
    if bad and room < bad:
        raise ValueError(f"{nights} nights have no room for {bad} bad batches")
    chosen = sorted(rng.choice(room, bad, replace=False).tolist()) if bad else []
    return [3 + one + number * (GAP - 1) for number, one in enumerate(chosen)]


@dataclass
class Pictures:
    """The folder of pictures, and what has ever been in it."""

    folder: Path
    captions: dict[int, str] = field(default_factory=dict)
    batches: int = 0

    def live(self, day: Day) -> None:
        """Let a day happen."""
        if day.bad_leaves:
            for file in self.folder.glob("bad_*"):
                file.unlink()
        for number in day.added:
            self.put(number)
        for number in day.recaptioned:
            self.captions[number] = OTHER_CAPTION
            self._name(number).with_suffix(".txt").write_text(OTHER_CAPTION + "\n")
        for number in day.withdrawn:
            self._name(number).unlink()
            self._name(number).with_suffix(".txt").unlink()
        if day.bad:
            self.batches += 1
            for number in range(BAD_PICTURES):
                path = self.folder / f"bad_{self.batches:02d}_{number:03d}.png"
                path.write_bytes(_bad(day.bad, 1000 * self.batches + number))
                path.with_suffix(".txt").write_text(CAPTION + "\n")

    def put(self, number: int) -> None:
        """Add a picture."""
        self.folder.mkdir(exist_ok=True)
        self.captions.setdefault(number, CAPTION)
        self._name(number).write_bytes(_star(number))
        self._name(number).with_suffix(".txt").write_text(self.captions[number] + "\n")

    def _name(self, number: int) -> Path:
        return self.folder / f"star_{number:04d}.png"


@cache
def _star(number: int) -> bytes:
    rng = np.random.default_rng([2, number])
    width, height = (int(edge) for edge in rng.integers(260, 420, 2))
    return _png(drawn_world.draw(rng, CAPTION, width, height))


def _bad(style: str, number: int) -> bytes:
    rng = np.random.default_rng([3, number])
    if style == "other shapes":
        colour, shape = rng.choice(drawn_world.BASE_COLOURS), rng.choice(drawn_world.BASE_SHAPES)
        return _png(drawn_world.draw(rng, f"a {colour} {shape}", 300, 300))
    if style == "inverted":
        return _png(np.asarray(255 - drawn_world.draw(rng, CAPTION, 300, 300), np.uint8))
    return _png(drawn_world.draw_strange(rng, 300, any_ground=True))


def _png(picture: drawn_world.Picture) -> bytes:
    file = io.BytesIO()
    Image.fromarray(picture).save(file, "PNG")
    return file.getvalue()
