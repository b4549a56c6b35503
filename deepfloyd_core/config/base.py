"""Shared by all configuration models: frozen, strict, no unknown keys, and errors that name the place and the remedy."""

import difflib
import io
import json
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args, get_origin

from pydantic import AfterValidator, BaseModel, ConfigDict, ValidationError
from pydantic.fields import FieldInfo

from deepfloyd_core.config.values import TOO_DEEP, checked_values, toml_values
from deepfloyd_core.errors import ConfigError


class Spec(BaseModel):
    """Base of the configuration models. Strict: "False" is not a bool, "64" not an int; nothing is converted."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


SpecT = TypeVar("SpecT", bound=Spec)
FILE_BYTES = 16 << 20  # of a configuration file
_MOST_FAULTS = 20  # that are told of one table
_LONG_KEY = 100  # characters
_SHORT_LIST = 16
_SHORT_VALUE = 60  # characters
_SECRET = re.compile(r"secret|token$|password|access_key", re.IGNORECASE)


def home_expanded(text: str) -> str:
    """A path with `~` or `~name` at its start replaced by that home folder. Raises ValueError where there is none."""
    if not text.startswith("~"):
        return text
    try:
        return str(Path(text).expanduser())
    except RuntimeError:
        raise ValueError(f"{text!r} starts with an unknown home folder. Write the path out, or ./{text}") from None


def home_path(path: Path) -> Path:
    """`home_expanded` for a single path. Raises ConfigError."""
    try:
        return Path(home_expanded(str(path)))
    except ValueError as error:
        raise ConfigError(f"{error}.") from None


def is_there(path: Path) -> bool:
    """Whether a path exists; False for a name that no file system accepts."""
    try:
        return path.exists()
    except OSError:
        return False


def is_folder(path: Path) -> bool:
    """Whether a path that somebody gave is a folder; False for a name that no file system accepts."""
    return is_there(path) and path.is_dir()


def is_file(path: Path) -> bool:
    """Whether a path that somebody gave is a file; False for a name that no file system accepts."""
    return is_there(path) and path.is_file()


_START: "ContextVar[Path | None]" = ContextVar("start_of_relative_paths", default=None)


@contextmanager
def relative_to(folder: Path | None) -> Iterator[None]:
    """Relative paths of the models that are read in this block start at this folder; None: at the current directory."""
    token = _START.set(folder)
    try:
        yield
    finally:
        _START.reset(token)


def _placed(text: str) -> str:
    text, start = home_expanded(text), _START.get()
    return text if start is None or not text or "://" in text else str(start / text)


def _placed_if_there(text: str) -> str:
    placed = _placed(text)
    return placed if is_there(Path(placed)) else home_expanded(text)


def _placed_unless_number(text: str) -> str:
    return _placed_if_there(text) if text.isdecimal() else _placed(text)


# The type of every key that names a file or folder, and of those that name one, or something else.
HomePath = Annotated[str, AfterValidator(_placed)]
PathOrNumber = Annotated[str, AfterValidator(_placed_unless_number)]
NameOrPath = Annotated[str, AfterValidator(_placed_if_there)]


def names_a_path(field: FieldInfo) -> bool:
    """Whether a key is of one of these types."""
    return any(isinstance(part, AfterValidator) and part.func in _PLACERS for part in _metadata_in(field))


def names_something_else(field: FieldInfo) -> bool:
    """Whether a key that names a file or folder can name a version or a model of the hub as well."""
    return any(isinstance(part, AfterValidator) and part.func in _PLACERS[1:] for part in _metadata_in(field))


_PLACERS = (_placed, _placed_unless_number, _placed_if_there)


def _metadata_in(field: FieldInfo) -> Iterator[Any]:
    """What a field and the members of its union are annotated with."""
    yield from field.metadata
    for member in get_args(field.annotation):
        yield from getattr(member, "__metadata__", ())


def read_config_text(path: Path) -> str:
    """The text of a configuration file: UTF-8, with or without a byte order mark, at most FILE_BYTES. Raises ConfigError."""
    try:
        with path.open("rb") as handle:  # or a pipe
            data = handle.read(FILE_BYTES + 1)
        if len(data) > FILE_BYTES:
            raise ConfigError(f"{path} is larger than {FILE_BYTES >> 20} MiB, and no configuration is.")
        return io.TextIOWrapper(io.BytesIO(data), encoding="utf-8-sig").read()
    except (OSError, UnicodeDecodeError) as error:
        reason = f"no text in UTF-8 ({error})"
        if isinstance(error, OSError):
            named = {FileNotFoundError: "no such file", IsADirectoryError: "it is a folder"}
            reason = named.get(type(error)) or str(error.strerror).lower()
        raise ConfigError(f"{path} cannot be read: {reason}.") from None


def read_config_file(path: Path) -> Any:
    """Read TOML or JSON (whole-line `#` comments allowed in JSON). Raises ConfigError with the parser's line number."""
    text = read_config_text(path)
    try:
        if path.suffix.lower() == ".toml":
            return toml_values(text)
        lines = ["" if line.lstrip().startswith("#") else line for line in re.split("\r\n?|\n", text)]
        values = json.loads("\n".join(lines), parse_constant=_no_constant, object_pairs_hook=_object)
        json.dumps(
            checked_values(values), ensure_ascii=False
        ).encode()  # half of a surrogate pair, as \ud800, is no text
        return values
    except (ValueError, RecursionError) as fault:
        kind = "TOML" if path.suffix.lower() == ".toml" else "JSON"
        error = TOO_DEEP if isinstance(fault, RecursionError) else fault
        raise ConfigError(f"{path} is not valid {kind}: {error}.{_remedy(str(error), text)}") from None


# How the parsers' messages start for a backslash that begins no escape, and for a text whose last quotation mark is escaped.
_BAD_ESCAPES = ("Invalid \\", "Unescaped", "Invalid hex value")
_OPEN_TEXTS = (
    "Unterminated string", "Invalid control character", "Illegal character", "Expecting ',' delimiter", "Unclosed array",
)  # fmt: skip
_ESCAPED_END = re.compile(r'\\"\s*(?:[],}]|$)')


def _remedy(fault: str, text: str) -> str:
    """What helps against the commonest slips in the line that a parser names. The line itself may hold a key to a bucket."""
    number = re.search(r"\bline (\d+)", fault)
    lines = text.split("\n")
    named = lines[int(number[1]) - 1 : int(number[1])] if number else lines
    if fault.startswith(_BAD_ESCAPES) or (fault.startswith(_OPEN_TEXTS) and any(map(_ESCAPED_END.search, named))):
        return " Write each \\ twice, or a path with /."
    slips = {
        "Invalid value (at": " Put texts in quotation marks; write true and false without them, in lower case.",
        "Expecting ',' delimiter": " A comma may be missing before it.",
        "Expecting property name": " An extra comma may stand before it.",
        "Illegal trailing comma": " Remove that comma.",
    }
    return next((remedy for slip, remedy in slips.items() if fault.startswith(slip)), "")


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not a valid JSON number")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object. JSON lets the last of two equal keys win; here that is an error, as it is in TOML."""
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        owner = f" of {found['id']!r}" if "id" in found else ""
        raise ValueError(f"the key {twice!r}{owner} occurs {names.count(twice)} times; keep one of them")
    return found


def parse_spec(model: type[SpecT], values: dict[str, Any], where: str, also: Iterable[str] = ()) -> SpecT:
    """Validate values into a model; every fault becomes one line of one ConfigError.

    `also`: keys that the user may write at the top level although the model has no such fields.
    """
    try:
        return model.model_validate(values)
    except ValidationError as error:
        lines = _fault_lines(model, error.errors(), tuple(also))
        raise ConfigError("\n".join(f"{where}: {line}" for line in lines)) from None


def shown(key: str, value: Any) -> str:
    """The value of a key for a message. Not that of a secret, nor what a table holds: it can be any other program's file."""
    if _SECRET.search(key):
        return "not shown here"
    if isinstance(value, dict):
        return "a table"
    if isinstance(value, list) and any(isinstance(inner, dict | list) for inner in value):
        return "a list of tables or lists"
    text = repr(value)
    return text if len(text) <= _SHORT_VALUE else f"{text[: _SHORT_VALUE - 3]}..."


def shortened(key: str) -> str:
    """A key for a message."""
    return key if len(key) <= _LONG_KEY else f"{key[:_LONG_KEY]}..."


def closest(key: str, known: Iterable[str]) -> str:
    """A remedy for an unknown key: the nearest known keys; if none is near, the list of all, if it is short."""
    names, key = sorted(known), key[:_LONG_KEY]
    likeness = {name: difflib.SequenceMatcher(None, name, key).ratio() for name in names}
    best = max(likeness.values(), default=0.0)
    near = sorted(
        (name for name in names if likeness[name] >= max(0.6, best - 0.05)), key=lambda name: -likeness[name]
    )[:3]
    if near:
        return f"Did you mean {' or '.join(near)}?"
    if len(names) <= _SHORT_LIST:
        return f"Known keys: {', '.join(names)}."
    return "docs/config.md has all keys."


def scalar_kinds(model: type[Spec]) -> dict[str, type | None]:
    """The type of each key's values, if it is bool, int, float, str or tuple; else None."""
    kinds = {name: set(_kinds_in(field.annotation)) for name, field in model.model_fields.items()}
    return {name: next(iter(found)) if len(found) == 1 else None for name, found in kinds.items()}


def _kinds_in(annotation: Any) -> Iterator[type]:
    if annotation in (bool, int, float, str):
        yield annotation
    elif get_origin(annotation) is tuple:
        yield tuple
    elif get_origin(annotation) is Literal:
        yield from {type(value) for value in get_args(annotation)}
    elif isinstance(annotation, type) and issubclass(annotation, Spec):
        yield annotation
    else:
        kinds = [part for part in get_args(annotation) if part is not type(None)]
        plain = [part for part in kinds if get_origin(part) is not Literal]  # words beside a number stay as they are
        for part in plain or kinds:
            yield from _kinds_in(part)


def _fault_lines(model: type[Spec], faults: Iterable[Any], also: tuple[str, ...]) -> list[str]:
    """One line for each wrong place. Of a union's branches only the one that got furthest is reported, or all of them
    together.
    """
    places: dict[tuple[str, ...], list[Any]] = {}
    for fault in faults:
        loc = fault["loc"]
        unknown = [str(loc[-1])] if fault["type"] == "extra_forbidden" else []
        path = _written_path(model, loc[:-1] if unknown else loc) + unknown
        places.setdefault(tuple(path), []).append(fault)
    inner = {path[:depth] for path in places for depth in range(1, len(path))}
    wrong = [(path, found) for path, found in places.items() if path not in inner]
    told = [_fault_line(model, list(path), found, also) for path, found in wrong[:_MOST_FAULTS]]
    told += [f"{len(wrong) - _MOST_FAULTS:,} more keys are wrong."] if len(wrong) > _MOST_FAULTS else []
    return [line for text in told for line in text.split("\n")]  # a model may report several faults among its keys


def _fault_line(model: type[Spec], path: list[str], faults: list[Any], also: tuple[str, ...]) -> str:
    kind, found, name = faults[0]["type"], faults[0].get("input"), shortened(".".join(path))
    if kind == "extra_forbidden":
        known = [*_model_at(model, path[:-1]).model_fields, *(also if len(path) == 1 else ())]
        return f"{name} is not a known key. {closest(path[-1], known)}"
    if kind == "missing":
        return f"{name} is missing."
    first, *others = dict.fromkeys(_message(fault) for fault in faults)
    message = " or ".join([first, *(other.removeprefix("Input should be ") for other in others)])
    if not path or kind == "value_error":
        ended = [line if line.endswith((".", "?")) else f"{line}." for line in message.split("\n")]
        return "\n".join(f"{name}: {line}" if path else line for line in ended)
    field = _model_at(model, path[:-1]).model_fields.get(path[-1])
    help_text = f" ({field.description})" if field is not None and field.description else ""
    return f"{name} is {shown(name, found)}; {message[:1].lower()}{message[1:]}.{help_text}"


def _message(fault: Any) -> str:
    plain = {"model_type": "Input should be a table", "tuple_type": "Input should be a list"}
    return plain.get(fault["type"], str(fault["msg"]).removeprefix("Value error, "))


def _written_path(model: type[Spec], loc: tuple[str | int, ...]) -> list[str]:
    """The place of a fault as the user wrote it: without the names that pydantic gives the branches of a union."""
    path: list[str] = []
    for part in loc:
        if isinstance(part, int) or part in _model_at(model, path).model_fields:
            path.append(str(part))
    return path


def _model_at(model: type[Spec], path: list[str]) -> type[Spec]:
    for part in path:
        field = model.model_fields.get(part)
        if field is not None:  # else a place in a list, of the same model
            model = next(_models_in(field.annotation), model)
    return model


def _models_in(annotation: Any) -> Iterator[type[Spec]]:
    """The models that a field's type mentions, at any depth: in a union, a list, an annotation."""
    if isinstance(annotation, type) and issubclass(annotation, Spec):
        yield annotation
    for part in getattr(annotation, "__args__", ()):
        yield from _models_in(part)
