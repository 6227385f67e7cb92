"""Strict YAML: text to a tree of plain values, each of which remembers where it stands.

YAML as most libraries read it is full of surprises: repeated keys overwrite each other, `no` is
False, `010` is 8, `12:30` is 750, `1e-4` is text, tags run code, and aliases of a few bytes expand
to gigabytes. Here the scalars are those of YAML 1.2 and everything else of that list is refused.
"""

import math
import re
import unicodedata
from dataclasses import dataclass, field

import yaml
from yaml.events import (
    AliasEvent,
    DocumentStartEvent,
    Event,
    MappingEndEvent,
    MappingStartEvent,
    ScalarEvent,
    SequenceEndEvent,
    SequenceStartEvent,
    StreamEndEvent,
)

from bigsimclr.errors import RecipeError

MAX_BYTES = 1_000_000
MAX_DEPTH = 20  # recipes need 5

Scalar = str | int | float | bool | None
Value = dict[str, "Node"] | list["Node"] | Scalar

_INTEGER = re.compile(r"[-+]?(0|[1-9][0-9]*)")
_FLOAT = re.compile(r"[-+]?(0|[1-9][0-9]*|(?=\.[0-9]))(\.[0-9]*)?([eE][-+]?[0-9]+)?")
_NOT_FINITE = re.compile(r"[-+]?\.?(inf|infinity)|\.?nan", re.IGNORECASE)
_LARGEST_INTEGER = 2**63 - 1

_ADVICE = {
    "mapping values are not allowed here": (
        "a second ':' in one line, or a wrong indentation; put text with ': ' in quotes"
    ),
    "could not find expected ':'": "a key without ':'; write key: value",
    "found unexpected end of stream": "a quote is opened and never closed",
    "cannot start any token": "put this text in quotes",
    "'<stream end>'": "a bracket is opened and never closed",
    "expected ',' or": "a ',' or a closing bracket is missing",
    "but found '}'": "a bracket is closed too often",
    "but found ']'": "a bracket is closed too often",
    "expected <block end>": "the indentation does not fit the lines above",
    "unknown escape character": "use single quotes, or write \\\\ for a backslash",
    "expected the node content": "a value is missing or a bracket is closed too often",
}


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong, and where."""

    origin: str  # "recipe.yaml:7" or "override loss.temperature"
    line: int  # sorts the report; 0 for overrides
    text: str


@dataclass(frozen=True)
class Node:
    """A value of the tree with the place it was written at."""

    value: Value
    origin: str
    line: int
    quoted: bool = False  # text that the writer put in quotes
    broken: bool = False  # already reported; further complaints about it are dropped


@dataclass
class TreeReading:
    """A tree and everything that is wrong with it short of breaking it off."""

    root: Node
    problems: list[Problem] = field(default_factory=list)


def show(text: str, limit: int = 60) -> str:
    """Make text from a file safe to print: one line, no control characters, not too long."""
    cut = text if len(text) <= limit else text[: limit - 1] + "…"
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in cut)


def plain_scalar(text: str) -> Scalar:
    """Return what unquoted text means in YAML 1.2; numbers too large for a float become text."""
    if text in ("", "~", "null"):
        return None
    if text in ("true", "false"):
        return text == "true"
    if len(text) <= 400 and _INTEGER.fullmatch(text):
        return int(text)
    if len(text) <= 400 and _FLOAT.fullmatch(text):
        return float(text)
    return text


def is_plain_text(text: str) -> bool:
    """Say whether unquoted text means itself, not a number, nor what only looks like one."""
    return isinstance(plain_scalar(text), str) and not _NOT_FINITE.fullmatch(text)


def decode(data: bytes, name: str) -> str:
    """Turn the bytes of a recipe file into text.

    Raises:
        RecipeError: the file is too large or not UTF-8.
    """
    if len(data) > MAX_BYTES:
        raise RecipeError(f"{show(name, 200)}:1: more than 1 MB; recipes are a few kilobytes")
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise RecipeError(
            f"{show(name, 200)}:{line}: byte 0x{data[error.start]:02x} is not UTF-8 text; "
            "save the file as UTF-8"
        ) from None


def read_tree(text: str, name: str) -> TreeReading:
    """Read one YAML document.

    Args:
        text: the document.
        name: how messages call the file.

    Raises:
        RecipeError: the text is no YAML, or uses what recipes may not.
    """
    return _Reader(text, name=show(name, 200), numbered=True).read()


def read_value(text: str, origin: str) -> TreeReading:
    """Read the value of an override, one line of YAML; nothing at all is null."""
    if not text.strip():
        return TreeReading(Node(None, origin, 0))
    return _Reader(text, name=origin, numbered=False).read()


class _Reader:
    """Builds the tree from YAML events, counting depth itself so that nothing recurses too far."""

    def __init__(self, text: str, *, name: str, numbered: bool) -> None:
        self._name = name
        self._numbered = numbered
        self._problems: list[Problem] = []
        self._open: list[int] = []  # lines of the brackets that are not closed yet
        if len(text) > MAX_BYTES:
            raise RecipeError(f"{self._origin(1)}: more than 1 MB of text")
        self._refuse_characters(text)
        self._loader = yaml.SafeLoader(text)

    def read(self) -> TreeReading:
        self._next()  # start of the stream
        start = self._next()
        if isinstance(start, StreamEndEvent):
            raise RecipeError(f"{self._origin(1)}: the file is empty; a recipe starts with stage:")
        if isinstance(start, DocumentStartEvent) and (start.version or start.tags):
            raise self._refusal(start, "a % directive; remove the line")
        root = self._node(self._next(), depth=1)
        self._next()  # end of the document
        after = self._next()
        if not isinstance(after, StreamEndEvent):
            raise self._refusal(after, "a second document begins; a file holds one recipe")
        return TreeReading(root, self._problems)

    def _next(self) -> Event:
        try:
            event: Event = self._loader.get_event()  # type: ignore[no-untyped-call]  # by the stubs
        except yaml.MarkedYAMLError as error:
            problem = error.problem or "no YAML"
            # What is never finished is best looked for where it begins.
            is_open = any(
                part in problem for part in ("end of stream", "stream end", "find expected")
            )
            mark = (is_open and error.context_mark) or error.problem_mark
            line = mark.line + 1 if mark else 1
            if "stream end" in problem and self._open:
                line = self._open[-1]
            advice = next((a for part, a in _ADVICE.items() if part in problem), None)
            raise RecipeError(f"{self._origin(line)}: {advice or show(problem, 200)}") from None
        except (yaml.YAMLError, ValueError, OverflowError):
            # PyYAML lets chr() fail on escapes beyond the last Unicode character.
            line = self._loader.line + 1
            raise RecipeError(f"{self._origin(line)}: text that is no valid YAML") from None
        return event

    def _node(self, event: Event, *, depth: int) -> Node:
        if depth > MAX_DEPTH:
            raise self._refusal(event, f"nested more than {MAX_DEPTH} levels deep")
        if isinstance(event, AliasEvent):
            name = show(event.anchor or "")
            raise self._refusal(event, f"*{name}: aliases are not allowed; repeat the value")
        if isinstance(event, ScalarEvent | MappingStartEvent | SequenceStartEvent):
            if event.anchor:
                name = show(event.anchor)
                raise self._refusal(event, f"&{name}: anchors are not allowed; remove it")
            if event.tag:
                raise self._refusal(event, f"tag {show(event.tag)} is not allowed; remove it")
        if isinstance(event, MappingStartEvent | SequenceStartEvent):
            return self._collection(event, depth=depth)
        if isinstance(event, ScalarEvent):
            return self._scalar(event)
        raise self._refusal(event, "this is no YAML a recipe can hold")

    def _collection(self, start: MappingStartEvent | SequenceStartEvent, *, depth: int) -> Node:
        if start.flow_style:
            self._open.append(self._line(start))
        if isinstance(start, MappingStartEvent):
            node = self._mapping(start, depth=depth)
        else:
            items = []
            while not isinstance(item := self._next(), SequenceEndEvent):
                items.append(self._node(item, depth=depth + 1))
            node = self._made(items, start)
        if start.flow_style:
            self._open.pop()
        return node

    def _mapping(self, start: Event, *, depth: int) -> Node:
        entries: dict[str, Node] = {}
        lines: dict[str, int] = {}
        while not isinstance(event := self._next(), MappingEndEvent):
            key_node = self._node(event, depth=depth + 1)
            value = self._node(self._next(), depth=depth + 1)
            key = self._key(event, key_node)
            if key in entries:
                first = f" (first in line {lines[key]})" if self._numbered else ""
                self._complain(event, f"key '{show(key)}' is given twice{first}; keep one")
            elif key is not None:
                # An error about a key belongs on the line of the key, even if its value follows.
                line = self._line(event)
                entries[key] = Node(
                    value.value, self._origin(line), line, value.quoted, value.broken
                )
                lines[key] = line
        return self._made(entries, start)

    def _key(self, event: Event, node: Node) -> str | None:
        if node.broken:
            return None
        if isinstance(node.value, str) and (node.value != "<<" or node.quoted):
            return node.value
        if node.value == "<<":
            self._complain(event, "merge keys (<<) are not allowed; repeat the keys")
        elif isinstance(node.value, dict | list):
            self._complain(event, "a list or a section cannot be a key; keys are text")
        elif isinstance(event, ScalarEvent):
            self._complain(event, f"key {show(event.value) or 'null'} is not text; keys are text")
        return None

    def _scalar(self, event: ScalarEvent) -> Node:
        text: str = event.value
        quoted = bool(event.style)
        if any(unicodedata.category(c) in ("Cc", "Cs") for c in text if c != "\n"):
            self._complain(event, f"'{show(text)}' holds a control character; remove it")
            return self._made(None, event, broken=True)
        value = text if quoted else plain_scalar(text)
        if not quoted and _NOT_FINITE.fullmatch(text):
            self._complain(event, f"{text} is not a finite number; text would need quotes")
            return self._made(None, event, broken=True)
        too_large = isinstance(value, int) and abs(value) > _LARGEST_INTEGER
        if too_large or (isinstance(value, float) and not math.isfinite(value)):
            self._complain(event, f"{show(text, 30)} is too large a number")
            return self._made(None, event, broken=True)
        return self._made(value, event, quoted=quoted)

    def _made(
        self, value: Value, event: Event, *, quoted: bool = False, broken: bool = False
    ) -> Node:
        line = self._line(event)
        return Node(value, self._origin(line), line, quoted, broken)

    def _refuse_characters(self, text: str) -> None:
        """Find what is no printable text; done first since the parser would not name the line."""
        if text.startswith("\ufeff"):
            raise RecipeError(
                f"{self._origin(1)}: the file starts with a byte order mark; save it as plain UTF-8"
            )
        for number, line in enumerate(text.split("\n"), start=1):
            for character in line.removesuffix("\r"):
                if character == "\t":
                    raise RecipeError(f"{self._origin(number)}: a tab; use spaces")
                if character in "\u2028\u2029\ufeff\ufffe\uffff" or (
                    unicodedata.category(character) in ("Cc", "Cs")
                ):
                    raise RecipeError(
                        f"{self._origin(number)}: control character U+{ord(character):04X}; "
                        "remove it"
                    )

    def _line(self, event: Event) -> int:
        return event.start_mark.line + 1 if self._numbered and event.start_mark else 0

    def _origin(self, line: int) -> str:
        return f"{self._name}:{line}" if self._numbered else self._name

    def _complain(self, event: Event, text: str) -> None:
        line = self._line(event)
        self._problems.append(Problem(self._origin(line), line, text))

    def _refusal(self, event: Event, text: str) -> RecipeError:
        return RecipeError(f"{self._origin(self._line(event))}: {text}")
