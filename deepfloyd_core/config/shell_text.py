"""Reads the small part of the shell language that SimpleTuner's run files need, as bash reads it, without running it.

It reads assignments, quotes, `$NAME`, `${NAME}`, `$((NAME / 10))` and `if [[ "$NAME" == "text" ]]; then` with elif,
else and fi. Everything else is refused, and so is a variable that the file has not set before: a shell would take it
from its environment.
"""

import re
from dataclasses import dataclass
from pathlib import Path

_NAME = re.compile(r"([A-Za-z_][A-Za-z0-9_]*)(\+?=)")
_REFERENCE = (
    r"\$\{(?P<braced>[A-Za-z_][A-Za-z0-9_]*)\}|\$(?P<name>[A-Za-z_][A-Za-z0-9_]*)"
    r"|\$\(\(\s*\$?(?P<left>\w+)\s*(?P<sign>[-+*/])\s*\$?(?P<right>\w+)\s*\)\)"
)
# A piece of a word. `{` and `(` begin lists, `~` after `:` a home folder: none of it is read here.
_PIECE = re.compile(
    rf"""'(?P<single>[^']*)'|"(?P<double>(?:[^"\\]|\\.)*)"|\\(?P<escaped>.)|{_REFERENCE}"""
    r"""|(?P<plain>(?:[^\s'"\\$`;&|<>(){}:]|:(?!~))+)"""
)
_PIECES = re.compile(rf"(?:{_PIECE.pattern}|[ \t:])*")
_IN_DOUBLE = re.compile(rf"""\\(?P<escaped>["\\$`])|{_REFERENCE}|(?P<wrong>[$`].*)""")
_WHOLE = re.compile(r"-?(?:0|[1-9][0-9]*)")
_GLOB = re.compile(r"[*?\[\\]")
_CONDITION = re.compile(r"(?:el)?if[ \t]+(\[\[?)[ \t]([^;]+)[ \t](\]\]?)(?:[ \t]*;[ \t]*(then))?(?:[ \t]+#.*)?")
_TURN = re.compile(r"(then|else|fi)(?:[ \t]+#.*)?")
_SIGNS = re.compile(
    r".[({]{0,2}", re.DOTALL
)  # how it begins, without what it says: the file may be no script of settings
_KEYWORD = re.compile(r"\b(?:if|elif|else|fi|then)\b")


@dataclass(frozen=True)
class _Word:
    name: str  # of the variable that it sets, else empty
    sign: str  # = or +=
    text: str
    bare: str  # of the text what no quotes hold


@dataclass(frozen=True)
class _Block:
    """An if, from its line on."""

    line: int
    part: str  # if, elif or else: which of its branches this is
    counts: bool  # whether the branch is taken
    did: bool  # whether one was
    waits: bool  # for its `then`


def read_assignments(text: str) -> dict[str, str]:
    """The variables that a script sets. Raises ValueError, with the line, for a script that does anything else."""
    variables: dict[str, str] = {}
    blocks: list[_Block] = []
    for number, line in enumerate(text.split("\n"), 1):
        try:
            if "\0" in line:
                raise ValueError("a zero byte, which no shell reads")
            _take(line.strip(" \t"), number, variables, blocks)
        except ValueError as error:
            raise ValueError(f"line {number}: {error}") from None
    if blocks:
        raise ValueError(f"line {blocks[-1].line}: the if has no fi")
    return variables


def _take(line: str, number: int, variables: dict[str, str], blocks: list[_Block]) -> None:
    if not line or line.startswith("#"):
        return
    word = re.match(r"[^\s;]*", line)[0]  # type: ignore[index]
    if blocks and blocks[-1].waits and word != "then":
        raise ValueError("expected a then here")
    if word in ("if", "elif", "else", "fi", "then"):
        _turn(line, word, number, variables, blocks)
    elif all(block.counts for block in blocks):
        _assign(line, variables)
    elif not _is_plain(line):
        raise ValueError("a branch that is not taken may only have whole commands on one line")


def _is_plain(line: str) -> bool:
    """Whether a line that is not run is surely one command, and one that a shell can read."""
    rest = re.sub(_REFERENCE, "", re.sub(r"""[ \t]#[^'"]*$""", "", line))
    return not re.search(r"[$`]", rest) and not _KEYWORD.search(rest) and _PIECES.fullmatch(rest) is not None


def _turn(line: str, word: str, number: int, variables: dict[str, str], blocks: list[_Block]) -> None:
    """Open, turn or end a block."""
    block = blocks.pop() if word != "if" and blocks else None
    if word == "if":
        counts, then = _condition(line, variables, asked=all(each.counts for each in blocks))
        blocks.append(_Block(number, word, counts, counts, not then))
        return
    if block is None:
        raise ValueError(f"{word} without an if")
    if word != "elif" and not _TURN.fullmatch(line):
        raise ValueError(f"{word} must be alone on its line here")
    if block.part == "else" and word in ("elif", "else"):
        raise ValueError(f"{word} after an else")
    if word == "then":
        if not block.waits:
            raise ValueError("then without an if")
        blocks.append(_Block(block.line, block.part, block.counts, block.did, False))
    elif word == "else":
        blocks.append(_Block(block.line, word, not block.did, True, False))
    elif word == "elif":
        counts, then = _condition(line, variables, asked=not block.did and all(each.counts for each in blocks))
        blocks.append(_Block(block.line, word, counts, block.did or counts, not then))


def _condition(line: str, variables: dict[str, str], asked: bool) -> tuple[bool, bool]:
    """Whether a condition is true, if that is asked, and whether its `then` is on its line."""
    form = ValueError('write a condition as if [[ "$NAME" == "text" ]]; then')
    match = _CONDITION.fullmatch(line)
    if match is None or len(match[1]) != len(match[3]):
        raise form
    if not asked:
        return False, match[4] is not None
    words = _words(match[2], variables)
    if len(words) != 3 or words[1].text not in ("=", "==", "!=") or words[1].text != words[1].bare:
        raise form
    left, _, right = words
    single = match[1] == "["
    if _GLOB.search(right.bare) or right.bare.startswith("~") or (single and _splits(left, right)):
        raise form
    return (left.text == right.text) == (words[1].text != "!="), match[4] is not None


def _splits(*words: _Word) -> bool:
    """Whether `[` would see other words than these."""
    return any(not word.text or re.search(r"\s", word.bare) or _GLOB.search(word.bare) for word in words)


def _assign(line: str, variables: dict[str, str]) -> None:
    export = re.match(r"export(?:[ \t]+|$)", line)
    known = dict(variables) if export else variables  # export sees all of its line before it sets anything
    for word in _words(line[export.end() :] if export else line, known, variables):
        if not word.name:
            raise ValueError("this is no NAME=value; a run file is read, not run")


def _words(line: str, known: dict[str, str], sets: dict[str, str] | None = None) -> list[_Word]:
    """The words of a line, with their references replaced by values; assignments are made in `sets` on the way."""
    words, at = [], 0
    while at < len(line):
        if line[at] in " \t":
            at += 1
        elif line[at] == "#":
            break
        else:
            word, at = _word(line, at, known)
            if sets is not None and word.name:
                before = sets.get(word.name, "") if word.sign == "+=" else ""
                sets[word.name] = before + word.text
            elif sets is not None:
                return [word]  # refused, before the rest of the line is
            words.append(word)
    return words


def _word(line: str, at: int, known: dict[str, str]) -> tuple[_Word, int]:
    start = _NAME.match(line, at)
    at = start.end() if start else at
    begin, text, bare = at, "", ""
    while at < len(line) and line[at] not in " \t":
        piece = _PIECE.match(line, at)
        if piece is None:
            raise ValueError(_refusal(line[at:]))
        if piece["single"] is not None:
            text += piece["single"]
        elif piece["double"] is not None:
            text += _IN_DOUBLE.sub(lambda match: _value(match, known), piece["double"])
        else:
            part = _value(piece, known)
            text, bare = text + part, bare + part
        at = piece.end()
    if start and line.startswith("~", begin):
        text = _home(text)
    return _Word(start[1] if start else "", start[2] if start else "", text, bare), at


def _refusal(rest: str) -> str:
    if rest[0] in "'\"":
        return "No closing quotation"
    return f"a shell would run what begins with {_SIGNS.match(rest)[0]!r}; write its value there"  # type: ignore[index]


def _value(match: re.Match[str], known: dict[str, str]) -> str:
    """The value of a piece of a word."""
    groups = match.groupdict()
    if groups.get("wrong") is not None:
        raise ValueError(_refusal(groups["wrong"]))
    for literal in ("escaped", "plain"):
        if groups.get(literal) is not None:
            return str(groups[literal])
    if groups["sign"] is not None:
        return _computed(match, known)
    name = groups["braced"] or groups["name"]
    if name == "HOME" and name not in known:
        return _home("~")
    if name not in known:
        raise ValueError(f"${name} is not set in the file. Write its value there")
    return known[name]


def _home(text: str) -> str:
    """A value that starts with `~`, with the user's home folder."""
    if text != "~" and not text.startswith("~/"):
        raise ValueError("this folder after a ~ only a shell knows. Write it out")
    try:
        return str(Path.home()) + text[1:]
    except RuntimeError:
        raise ValueError("the home folder is not known. Write it out") from None


def _computed(match: re.Match[str], known: dict[str, str]) -> str:
    numbers = []
    for name in (match["left"], match["right"]):
        value = known.get(name, name)
        if not _WHOLE.fullmatch(value):
            raise ValueError("one of the two is no whole number")
        numbers.append(int(value))
    left, right = numbers
    if match["sign"] == "/" and right == 0:
        raise ValueError("this divides by 0")
    if match["sign"] == "/":
        whole = abs(left) // abs(right)  # towards 0
        return str(whole if (left < 0) == (right < 0) else -whole)
    return str({"+": left + right, "-": left - right, "*": left * right}[match["sign"]])
