"""Which trees of files may be there after a power loss, of the calls that a process made: a model of a disk.

The bytes of a file are on the disk from its own flush on. Of what was written since then, after a power loss there is
nothing, all, the first half, or zeros in its length; of several such files also one alone is lost. A name is on the disk:

- on a disk with a journal (ext4, XFS: operations on names reach the disk in their order, and each flush, of whatever file,
  sends all before it), every prefix of the operations that has all before the last flush;
- on a disk without (POSIX promises no more): those of a folder that was flushed later. Of the others none, all, each
  alone, or all but one.

A rename is on the disk as a whole or not at all, and brings the bytes that the renamed file has there: none, if it was never
flushed. What has no folder is lost. Lengths that were cut count as bytes.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path, PurePosixPath

from file_calls import Call

Tree = dict[str, bytes | None]  # by path; None: a folder


@dataclass
class _File:
    """The bytes of a file: as a process reads them, and as they are on the disk."""

    now: bytes = b""
    durable: bytes = b""

    @property
    def is_dirty(self) -> bool:
        return self.now != self.durable

    def after(self, how: str) -> bytes:
        if how == "all" or not self.is_dirty:
            return self.now
        half = self.now[: (len(self.durable) + len(self.now)) // 2]
        zeros = self.durable + bytes(max(0, len(self.now) - len(self.durable)))
        return {"nothing": self.durable, "half": half, "zeros": zeros}[how]


_Names = dict[str, "_File | None"]


@dataclass
class _Change:
    """An operation on names. file: of a name that is made."""

    call: Call
    file: "_File | None"
    is_durable: bool = False

    def folders(self) -> set[str]:
        return {str(PurePosixPath(path).parent) for path in (self.call.path, self.call.other) if path}

    def do(self, names: _Names) -> None:
        """To names that may lack what went before it."""
        path, other = self.call.path, self.call.other
        match self.call.kind:
            case "c" | "m":
                names[path] = self.file
            case "r":
                for name in [name for name in names if name.startswith(f"{path}/")]:
                    names[other + name.removeprefix(path)] = names.pop(name)
                names[other] = names.pop(path, self.file)
            case "l":
                names[other] = self.file
            case _:
                names.pop(path, None)


def read_tree(folder: Path) -> Tree:
    """What is in a folder."""
    return {str(path): path.read_bytes() if path.is_file() else None for path in sorted(folder.rglob("*"))}


def write_tree(folder: Path, tree: Tree) -> None:
    """Put a tree into a folder that is empty."""
    for name, data in sorted(tree.items()):
        if data is None:
            Path(name).mkdir(parents=True, exist_ok=True)
        else:
            Path(name).parent.mkdir(parents=True, exist_ok=True)
            Path(name).write_bytes(data)


def killed_trees(folder: Path, before: Tree, calls: Sequence[Call]) -> Iterator[Tree]:
    """The trees after each call, as a killed process leaves them."""
    disk = _Disk(folder, before)
    yield before
    for call in calls:
        disk.see(call)
        yield disk.tree(disk.changes, {})


def crashed_trees(folder: Path, before: Tree, calls: Sequence[Call]) -> Iterator[Tree]:
    """Each tree that a power loss at any moment may leave, once."""
    disk, seen = _Disk(folder, before), set[bytes]()
    for call in calls:
        disk.see(call)
        if call.kind not in "oR":
            for tree in disk.crashed():
                if (key := _key(tree)) not in seen:
                    seen.add(key)
                    yield tree


class _Disk:
    def __init__(self, folder: Path, before: Tree) -> None:
        self._folder = str(folder)
        self._first: _Names = {
            name: None if data is None else _File(data, data) for name, data in before.items()
        }  # fmt: skip
        self._names = dict(self._first)
        self.changes: list[_Change] = []
        self._sent = 0  # changes before the last flush

    def see(self, call: Call) -> None:
        """A call has been made."""
        file = self._names.get(call.path)
        match call.kind:
            case "c":
                self._change(_Change(call, _File()))
            case "m" | "u" | "d":
                self._change(_Change(call, None))
            case "r" | "l":
                self._change(_Change(call, file))
            case "w" if file:
                cut = file.now[: call.offset].ljust(call.offset, b"\0")
                file.now = cut + call.data + file.now[call.offset + len(call.data) :]
            case "t" if file:
                file.now = file.now[: call.offset].ljust(call.offset, b"\0")
            case "f":
                self._flush(call.path, file)
            case "M":
                raise AssertionError(f"{call.path} is written through a mapping, which a full disk turns into SIGBUS")

    def _change(self, change: _Change) -> None:
        change.do(self._names)
        self.changes.append(change)

    def _flush(self, path: str, file: "_File | None") -> None:
        self._sent = len(self.changes)
        if file is not None:
            file.durable = file.now
        for change in self.changes:
            change.is_durable |= file is None and path in change.folders()

    def crashed(self) -> Iterator[Tree]:
        """What may be there if the power is lost now."""
        dirty = [file for file in [*self._names.values()] if file is not None and file.is_dirty]
        each_lost = [{id(file): "nothing"} for file in dirty] if len(dirty) > 1 else []
        states = [dict.fromkeys(map(id, dirty), how) for how in ("nothing", "half", "zeros")] + each_lost + [{}]
        for kept in self._kept():
            for state in states:
                yield self.tree(kept, state)

    def _kept(self) -> Iterator[list[_Change]]:
        for end in range(self._sent, len(self.changes) + 1):
            yield self.changes[:end]
        open_ones = [change for change in self.changes if not change.is_durable]
        for subset in (
            [],
            *([one] for one in open_ones),
            *([c for c in open_ones if c is not one] for one in open_ones),
        ):
            chosen = set(map(id, subset))
            yield [change for change in self.changes if change.is_durable or id(change) in chosen]

    def tree(self, changes: Sequence[_Change], state: Mapping[int, str]) -> Tree:
        """The tree after these changes. state: what is there of files, by identity; else all."""
        names = dict(self._first)
        for change in changes:
            change.do(names)
        folders = {name for name, file in names.items() if file is None}
        return {
            name: None if file is None else file.after(state.get(id(file), "all"))
            for name, file in names.items() if _is_reached(name, folders, self._folder)
        }  # fmt: skip


def _is_reached(name: str, folders: set[str], top: str) -> bool:
    parents = [str(parent) for parent in PurePosixPath(name).parents]
    inside = [parent for parent in parents if parent.startswith(f"{top}/")]
    return all(parent in folders for parent in inside)


def _key(tree: Tree) -> bytes:
    digest = sha256()
    for name, data in sorted(tree.items()):
        digest.update(f"{name}\0{-1 if data is None else len(data)}\0".encode())
        digest.update(data or b"")
    return digest.digest()
