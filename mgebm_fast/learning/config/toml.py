"""TOML: read by tomllib (before Python 3.11 the package it came from), written here: configurations have few forms."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Mapping
from typing import Any

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

__all__ = ["MOST_BYTES", "parse", "written"]

MOST_BYTES = 256 << 10  # of a configuration file
_MOST_PARTS = 100  # of a dotted key: tomllib takes memory that grows with the square of their number


def parse(text: str) -> dict[str, Any]:
    """The table that a TOML text describes. ValueError says what is wrong with it, whatever that is."""
    if len(text) > MOST_BYTES:
        raise ValueError(f"more than {MOST_BYTES:,} characters")
    pieces = re.split(r"[=\[\]{},#\n]", re.sub(r"[ \t]+", "", text))
    if max(piece.count(".") for piece in pieces) > _MOST_PARTS:
        raise ValueError(f"a key of more than {_MOST_PARTS} dotted parts")
    try:
        return tomllib.loads(text)
    except RecursionError:
        raise ValueError("lists or tables in each other too deeply") from None


def written(values: Mapping[str, Any]) -> str:
    """A table of plain values, and of tables of such, as TOML text.

    Plain are bool, int, float, str, lists of these, one item a line, and tables in tables, in one line; anything else
    is a TypeError.
    """
    plain = {key: value for key, value in values.items() if not isinstance(value, Mapping)}
    parts = [_lines(plain)] if plain else []
    for name, table in values.items():
        if isinstance(table, Mapping):
            parts.append(f"[{_key(name)}]\n{_lines(table)}")
    return "\n".join(parts)


def _lines(values: Mapping[str, Any]) -> str:
    return "".join(f"{_key(key)} = {_literal(value)}\n" for key, value in values.items())


def _key(name: str) -> str:
    return name if re.fullmatch(r"[A-Za-z0-9_-]+", name) else _literal(name)


def _literal(value: Any, indent: str = "") -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, (int, float)):
        return str(value)
    if isinstance(value, str):
        # JSON's escapes are TOML's, which wants the delete character escaped too.
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(value, (list, tuple)):
        deeper = indent + "    "
        items = "".join(f"{deeper}{_literal(item, deeper)},\n" for item in value)
        return f"[\n{items}{indent}]" if value else "[]"
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{_key(key)} = {_literal(entry)}" for key, entry in value.items()) + "}"
    raise TypeError(f"a configuration must hold numbers, text and lists of them, got {type(value).__name__}")
