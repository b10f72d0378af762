"""A target for the shards of a split."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import specification
import structured
from breaks import broken
from choices import Choices
from common import check_said, folder
from reading import count_of_shards, opened

import numba_dequant as nd


def shards(data: bytes) -> str:
    """The shards of a model, of which some are broken, missing or exchanged; as a list and beside one another."""
    choices = Choices(data)
    described = structured.split(choices)
    if choices.one_in(2):
        broken(choices, choices.pick(described))
    contents = [file.content() for file in described]
    right = len(contents)
    if choices.one_in(4):
        contents[choices.below(right)] = choices.pick(contents)
    gone = choices.below(right) if choices.one_in(4) else None
    allow_truncated = choices.one_in(3)
    judgements = [judged_shard(content, allow_truncated=allow_truncated) for content in contents]
    if gone is None:
        sequence = list(range(right))
        for at in range(right):
            other = choices.below(right)
            sequence[at], sequence[other] = sequence[other], sequence[at]
        model = opened([bytearray(contents[at]) for at in sequence], allow_truncated=allow_truncated)
        assert_joined(model, joined([judgements[at] for at in sequence]), contents)
    by_name = write_shards(contents, gone, choices)
    model = opened_path(by_name, allow_truncated=allow_truncated)
    expected = by_their_names(judgements, gone, allow_truncated=allow_truncated)
    if isinstance(model, nd.Model):
        assert expected is not None, "opened, but a rule is broken"
        assert sorted(model.tensors) == sorted(expected)
        model.load_all(device="reference") if not allow_truncated else None
    else:
        assert expected is None, f"refused, but no rule is broken: {model}"
    return "opened" if isinstance(model, nd.Model) else "refused"


def judged_shard(content: bytes, *, allow_truncated: bool) -> specification.Contents | None:
    try:
        return specification.read(content, allow_truncated=allow_truncated)
    except specification.ViolationError:
        return None


def joined(shards: list[specification.Contents | None]) -> list[str] | None:
    """The names of the tensors of shards in a list, in order; None if they are not those of one model."""
    found = [shard for shard in shards if shard is not None]
    if len(found) < len(shards):
        return None
    if len(found) == 1 and found[0].metadata.get("split.count", 0) in (0, 1):
        return list(found[0].tensors)
    numbers = [shard.metadata.get("split.no") for shard in found]
    if any(shard.metadata.get("split.count") != len(found) for shard in found):
        return None
    if sorted(number for number in numbers if number is not None) != list(range(len(found))):
        return None
    found.sort(key=lambda shard: shard.metadata["split.no"])
    names = [name for shard in found for name in shard.tensors]
    total = found[0].metadata.get("split.tensors.count", len(names))
    return names if len(set(names)) == len(names) == total else None


def assert_joined(model: Any, names: list[str] | None, contents: list[bytes]) -> None:
    if isinstance(model, nd.Model):
        assert names is not None, "opened, but a rule is broken"
        assert list(model.tensors) == names
    else:
        assert names is None, f"refused, but no rule is broken: {model}"


def write_shards(contents: list[bytes], gone: int | None, choices: Choices) -> Path:
    place = folder() / "shards"
    place.mkdir(exist_ok=True)
    for old in place.iterdir():
        old.unlink()
    count = len(contents)
    for number, content in enumerate(contents, 1):
        if number - 1 != gone:
            (place / f"m-{number:05}-of-{count:05}.gguf").write_bytes(content)
    return place / f"m-00001-of-{count:05}.gguf"


def opened_path(path: Path, **options: Any) -> nd.Model | nd.NumbaDequantError:
    try:
        return opened(path, **options)
    except nd.ReadError as error:
        check_said(error)
        return error


def numbers_of(shard: specification.Contents) -> tuple[Any, Any]:
    return shard.metadata.get("split.no"), shard.metadata.get("split.count")


def by_their_names(
    shards: list[specification.Contents | None], gone: int | None, *, allow_truncated: bool
) -> list[str] | None:
    """The names of the tensors of shards that are found beside the first."""
    first = shards[0]
    count = -1 if gone == 0 or first is None else count_of_shards(first)
    if first is None or not 0 <= count <= 65535:
        return None
    if count <= 1:
        return list(first.tensors)
    if count != len(shards) or first.metadata.get("split.no") != 0 or (gone is not None and not allow_truncated):
        return None
    found = [(number, shard) for number, shard in enumerate(shards) if number != gone]
    if not all(shard is not None and numbers_of(shard) == (number, count) for number, shard in found):
        return None
    names = [name for _, shard in found if shard is not None for name in shard.tensors]
    if len(set(names)) < len(names):
        return None
    total = first.metadata.get("split.tensors.count", len(names))
    return names if total == len(names) or gone is not None else None
