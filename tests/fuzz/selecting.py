"""A target for the choice of tensors: names, globs, expressions, functions, types and rows."""

from __future__ import annotations

import contextlib
import re
from typing import Any

import numpy as np
import structured
from choices import Choices
from common import check_said, expect
from computing import DTYPES

import numba_dequant as nd

PIECES = ["blk", ".", "*", "?", "[", "]", "!", "0", "1", "attn", "weight", "-", "a", "z", "\\", "^", "&&", "~~", "||"]
PIECES += ["[0-9]", "[!a]", "[]]", "[!]", "[z-a]", "ids", "t", "T", "ü", "\n", "\0", "(", "$", "[[]", "[a--b]", "{}"]
EXPRESSIONS = ["a", r"\d", "^t", "x{3}", "", r"(?i)T", "[.]", "weight$", "e?"]


def matches(name: str, glob: str) -> bool:
    """Whether a glob matches a name, by the rules of the shell: one character after the other."""
    reached = {0}
    at = 0
    while at < len(glob):
        character, end = glob[at], at + 1
        if character == "*":
            reached = set(range(min(reached), len(name) + 1)) if reached else set()
        elif character == "[" and (close := glob.find("]", at + 2 + (glob[at + 1 : at + 2] == "!"))) > 0:
            inside, end = glob[at + 1 : close], close + 1
            reached = {spot + 1 for spot in reached if spot < len(name) and in_set(name[spot], inside)}
        else:
            reached = {spot + 1 for spot in reached if spot < len(name) and character in ("?", name[spot])}
        at = end
    return len(name) in reached


def in_set(character: str, inside: str) -> bool:
    """Whether a character is in the set between brackets."""
    is_negated = inside.startswith("!")
    inside = inside[is_negated:]
    found, at = False, 0
    while at < len(inside):
        if at + 2 < len(inside) and inside[at + 1] == "-":
            found, at = found or inside[at] <= character <= inside[at + 2], at + 3
        else:
            found, at = found or inside[at] == character, at + 1
    return found is not is_negated


def glob_of(choices: Choices, names: list[str]) -> str:
    if names and choices.one_in(3):
        return choices.pick(names)
    return "".join(choices.some(PIECES, 6))


def pick_of(choices: Choices, model: nd.Model) -> tuple[Any, list[str] | None]:
    """A pick, and the names that it means; None where it is to be refused."""
    names = list(model.tensors)
    way = choices.below(6)
    if way == 0 and names:
        name = choices.pick(names)
        return model.tensors[name], [name]
    if way == 1:
        expression = re.compile(choices.pick(EXPRESSIONS))
        found = [name for name in names if expression.search(name)]
        return expression, found or None
    glob = glob_of(choices, names)
    if glob in names:
        return glob, [glob]
    return glob, [name for name in names if matches(name, glob)] or None


def type_rules(choices: Choices, names: list[str]) -> tuple[Any, dict[str, str | None]]:
    """An output type or rules for it, and the type of each name; None where no rule matches."""
    if choices.one_in(3):
        dtype = choices.pick(DTYPES)
        return dtype, dict.fromkeys(names, dtype)
    rules: dict[Any, str] = {glob_of(choices, names): choices.pick(DTYPES) for _ in range(choices.below(4))}
    if choices.one_in(2):
        rules[choices.pick(["*", re.compile(choices.pick(EXPRESSIONS))])] = choices.pick(DTYPES)
    found: dict[str, str | None] = {}
    for name in names:
        fits = (
            dtype
            for rule, dtype in rules.items()
            if (rule == name or matches(name, rule) if isinstance(rule, str) else rule.search(name))
        )
        found[name] = next(fits, None)
    return rules, found


def selection(data: bytes) -> str:
    """What is loaded is what the picks mean, in the order of the file and with the types of the first rules."""
    choices = Choices(data)
    model = nd.open(bytearray(structured.valid(choices).content()))
    names = list(model.tensors)
    picks = [pick_of(choices, model) for _ in range(choices.between(1, 3))]
    select: Any = [pick for pick, _ in picks]
    if len(picks) == 1:
        select = select[0]
    elif choices.one_in(2):
        select = choices.pick([tuple(select), iter(select)])
    is_wrong = any(found is None for _, found in picks)
    missing = choices.pick([*PIECES, *structured.NAMES]) + choices.pick(["", "x", "weight"])
    with contextlib.suppress(nd.TensorNotFoundError):
        expect(model.load(missing, device="reference").shape == model.tensors[missing].shape, missing)
    wanted = [name for name in names if any(name in (found or ()) for _, found in picks)]
    if choices.one_in(8):
        select, is_wrong, wanted = None, False, names
    rules, types = type_rules(choices, wanted)
    is_wrong = is_wrong or None in types.values()
    try:
        found = model.load_all(select, rules, device="reference")
    except (nd.TensorNotFoundError, nd.DtypeError) as error:
        check_said(error)
        expect(is_wrong, f"refused, but the picks are right: {error}")
        return "refused"
    assert not is_wrong, "taken, but a pick or a rule is wrong"
    assert list(found) == wanted
    for name, values in found.items():
        stored = model.tensors[name].format.stored_dtype
        assert values.dtype.name == (types[name] if stored is None else stored.name)
        check_rows(choices, model, name)
    return "loaded"


def check_rows(choices: Choices, model: nd.Model, name: str) -> None:
    """Rows are those of the whole tensor."""
    tensor = model.tensors[name]
    end = choices.pick([None, 0, 1, -1, 2, 5, 1 << 70, -(1 << 70)])
    rows = slice(choices.pick([None, 0, 1, -1, 7, -3]), end, choices.pick([None, 1, 1, 2]))
    try:
        found = model.load(name, "float32", device="reference", rows=rows)
    except nd.ShapeError as error:
        check_said(error)
        return
    whole = model.load(name, "float32", device="reference")
    assert rows.step in (None, 1)
    np.testing.assert_array_equal(found, whole[rows], str(tensor.shape))
