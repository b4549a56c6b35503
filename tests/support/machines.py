"""Two machines on this one: each has a network and a folder of its own, and reaches the other by its address alone.

A process that sleeps holds a network namespace and a mount namespace; commands enter both. The folder is memory that is
mounted over the same path in each, so what one machine writes there the other has not. Needs root, and Linux.
"""

import os
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

_NET = "10.77.31"  # of the wire between them


@dataclass(frozen=True)
class Machine:
    """One of them."""

    number: int
    pid: int  # of what holds its namespaces
    folder: Path  # its own, by a path that the other has as well

    @property
    def address(self) -> str:
        """On the wire."""
        return f"{_NET}.{self.number}"

    def call(self, *command: str, environ: Mapping[str, str] | None = None) -> "subprocess.CompletedProcess[str]":
        """What a command returns and prints there."""
        return subprocess.run(
            self._inside(command), env=environ, cwd=self.folder, capture_output=True, text=True, timeout=300
        )

    @contextmanager
    def running(self, log: str, *command: str, environ: Mapping[str, str]) -> Iterator["subprocess.Popen[bytes]"]:
        """A command that runs there in this block; what it prints goes to a file of that machine."""
        line = self._inside(("sh", "-c", f'exec "$@" > {self.folder}/{log} 2>&1', "sh", *command))
        process = subprocess.Popen(line, env=environ, start_new_session=True)
        try:
            yield process
        finally:
            process.terminate()
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    def read(self, name: str) -> str:
        """A text of its folder; empty: there is none."""
        return self.call("cat", str(self.folder / name)).stdout

    def put(self, name: str, text: str) -> None:
        """Write a text into its folder."""
        line = self._inside(("sh", "-c", f'mkdir -p "$(dirname {name})" && cat > {name}'))
        subprocess.run(line, input=text, text=True, cwd=self.folder, check=True)

    def _inside(self, command: tuple[str, ...]) -> list[str]:
        return ["nsenter", "-t", str(self.pid), "-n", "-m", f"--wdns={self.folder}", "--", *command]


def can_make() -> bool:
    """Whether machines can be made here."""
    return os.geteuid() == 0 and all(map(shutil.which, ("ip", "unshare", "nsenter")))


@contextmanager
def two_machines(folder: Path) -> Iterator[tuple[Machine, Machine]]:
    """folder: of both, empty."""
    with ExitStack() as held:
        one, two = (held.enter_context(_machine(number, folder)) for number in (1, 2))
        names = [f"df{os.getpid() % 10000}{end}" for end in "ab"]
        _run("ip", "link", "add", names[0], "type", "veth", "peer", "name", names[1])
        for machine, name in zip((one, two), names, strict=True):
            _run("ip", "link", "set", name, "netns", str(machine.pid))
            for words in (f"addr add {machine.address}/24 dev {name}", f"link set {name} up", "link set lo up"):
                assert machine.call("ip", *words.split()).returncode == 0, words
        yield one, two


@contextmanager
def _machine(number: int, folder: Path) -> Iterator[Machine]:
    line = f'mount -t tmpfs tmpfs "{folder}" && echo ready && exec sleep infinity'
    command = ["unshare", "-n", "-m", "--propagation", "private", "sh", "-c", line]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as holder:
        try:
            assert holder.stdout is not None and holder.stdout.readline() == "ready\n"
            yield Machine(number, holder.pid, folder)
        finally:
            holder.kill()


def _run(*command: str) -> None:
    subprocess.run(command, check=True)
