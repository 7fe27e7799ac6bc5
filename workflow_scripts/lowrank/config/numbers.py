"""Numbers that YAML reads as others than those that a person sees: `010` as 8, `1:30` as 90.

Some programs read them otherwise, or as text: octal numbers begin with `0` in YAML 1.1 and with `0o` in YAML 1.2. So a
config has none of them. Hexadecimal and binary numbers mean the same to everybody.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

import yaml

from lowrank.config.place import shown, written

_OCTAL = re.compile(r"([-+]?)0([oO]?)([0-9_]+)")
_SIXTIES = re.compile(r"[-+]?[0-9][0-9_]*(:[0-5]?[0-9])+(\.[0-9_]*)?")
_NUMBERS = ("tag:yaml.org,2002:int", "tag:yaml.org,2002:float")
_MERGE = "tag:yaml.org,2002:merge"


def odd_numbers(root: yaml.Node) -> Iterator[tuple[yaml.ScalarNode, str]]:
    """The scalars of a document that are such numbers, keys too, each with its YAML path, in the order of the file."""
    for node, path in _scalars(root, "", set()):
        number = node.tag in _NUMBERS
        octal = (number or not node.style) and _OCTAL.fullmatch(node.value)  # those with a style are quoted
        if octal or (number and _SIXTIES.fullmatch(node.value)):
            yield node, path


def reading(text: str, value: object) -> str:
    """How YAML reads an odd number, and what to write instead.

    Args:
        text: as it is written.
        value: as YAML reads it.
    """
    read, choices = shown(value), [shown(value)]
    if octal := _OCTAL.fullmatch(text):
        sign, letter, digits = octal.groups()
        decimal = digits.replace("_", "").lstrip("0") or "0"
        eights = str(int(decimal, 8)) if set(decimal) <= set("01234567") else decimal
        choices = [sign.strip("+") + number for number in ([eights] if letter else [decimal, eights])]
    kind = "text" if isinstance(value, str) else f"{read} (octal)" if octal else f"{read} (base 60)"
    decimals = " or ".join(dict.fromkeys(choices))
    return f"YAML reads {text} as {kind}; write {decimals}, or '{text}' in quotes if it is text"


def _scalars(node: yaml.Node, path: str, seen: set[int]) -> Iterator[tuple[yaml.ScalarNode, str]]:
    """All scalars, keys too, each with its path; what an alias repeats only where it stands first."""
    if isinstance(node, yaml.ScalarNode):
        yield node, path
    elif id(node) not in seen:
        seen.add(id(node))
        if isinstance(node, yaml.SequenceNode):
            for index, value in enumerate(node.value):
                yield from _scalars(value, f"{path}[{index}]", seen)
        elif isinstance(node, yaml.MappingNode):
            for key, value in node.value:
                name = key.value if isinstance(key, yaml.ScalarNode) else "?"
                inner = path if key.tag == _MERGE else path + written(name, first=not path)
                yield from _scalars(key, inner, seen)
                yield from _scalars(value, inner, seen)
