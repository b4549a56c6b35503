"""The campaign of kills with the workspace in a bucket, behind a proxy that refuses, cuts and loses answers.

Each command that was killed is given again, on one of two machines that share nothing but the bucket. What a third one finds
there in the end has the bytes of an undisturbed run on a disk. Dead runs lose their turn after two seconds, not sixty.
"""

import os
import random
import time
from dataclasses import dataclass
from pathlib import Path

import boto3
from faulty_s3 import faulty_s3
from kills import Pass, killed_passes, new_pass
from rows import Row
from s3_server import s3_server

from deepfloyd_core.config.bucket_workspace import checked_url
from deepfloyd_core.files import sha256_file
from deepfloyd_core.store import bucket_turn
from deepfloyd_core.store.artifacts import all_artifacts
from deepfloyd_core.store.mirror import open_mirror
from flows.serving.server import prefect_server, see_environment

SHARE = 1
_LEASE_S, _BEAT_S = 2.0, 0.5


@dataclass
class BucketPass(Pass):
    """A run whose workspace is in a bucket."""

    @property
    def workspace(self) -> str:
        """A prefix of its own."""
        return checked_url(f"s3://work/{self.run.folder.parent.name}/{self.run.folder.name}")

    @property
    def commands(self) -> list[tuple[str, ...]]:
        """Those of a run on a disk, elsewhere."""
        place = ("--set", f"workspace={self.workspace}")
        return [(*command, *place) if command[0] != "publish" else command for command in super().commands]

    def move(self, chance: random.Random) -> None:
        """Two machines: they have a home each."""
        os.environ["HOME"] = str(self.run.folder / f"machine-{chance.randrange(2)}")

    def hashes(self) -> dict[str, str]:
        """Those of a machine that has nothing yet."""
        found = {name: digest for name, digest in super().hashes().items() if name.startswith("published/")}
        for artifact in all_artifacts(open_mirror(self.workspace, self.run.folder / "third").workspace):
            for name in artifact.hashes:
                found[f"{artifact.kind}/{name}"] = sha256_file(artifact.path / name)
        return found

    def stage(self, command: tuple[str, ...]) -> str:
        """Not told: one of two machines knows it."""
        return "in a bucket"


def attack(seconds: float, seed: int, folder: Path) -> list[Row]:
    """Passes until the time is over, at least one."""
    end, home = time.monotonic() + seconds, os.environ["HOME"]
    bucket_turn.LEASE_S, bucket_turn.BEAT_S = _LEASE_S, _BEAT_S
    with prefect_server(folder / "home"), s3_server() as url, faulty_s3(url, seed) as (address, answers):
        see_environment()
        os.environ["AWS_ENDPOINT_URL"] = address
        boto3.resource("s3", endpoint_url=url).create_bucket(Bucket="work")
        kills, number, failures = killed_passes(
            lambda number: new_pass(folder / str(number), kind=BucketPass), folder, end, seed
        )
        os.environ["HOME"] = home
        del os.environ["AWS_ENDPOINT_URL"]
    spoilt = sum(count for name, count in answers.items() if name != "passed")
    return [
        Row("bucket: kills", sum(kills.values()), 0, []),
        Row("bucket: answers that were refused, cut or lost", spoilt, 0, []),
        Row("bucket: passes of killed commands on two machines, every byte compared", number, len(failures), failures),
    ]
