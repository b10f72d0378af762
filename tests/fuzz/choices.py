"""Choices that come from bytes, so that a fuzzer that changes bytes changes choices."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import TypeVar

Item = TypeVar("Item")


class Choices:
    """Choices drawn from `data`. When its bytes end, a generator of random numbers with `data` as its seed goes on."""

    def __init__(self, data: bytes) -> None:
        self._data, self._at = data, 0
        self._rest: random.Random | None = None

    def below(self, n: int) -> int:
        """A number from 0 to `n` - 1."""
        size = 1 if n <= 256 else 2 if n <= 65536 else 8
        return int.from_bytes(self.bytes(size), "little") % n

    def bytes(self, n: int) -> bytes:
        """`n` bytes."""
        if self._at + n <= len(self._data):
            self._at += n
            return self._data[self._at - n : self._at]
        self._at = len(self._data)
        if self._rest is None:
            self._rest = random.Random(self._data)
        return self._rest.randbytes(n)

    def between(self, least: int, most: int) -> int:
        """A number from `least` to `most`."""
        return least + self.below(most - least + 1)

    def pick(self, items: Sequence[Item]) -> Item:
        """One of `items`."""
        return items[self.below(len(items))]

    def some(self, items: Sequence[Item], most: int) -> list[Item]:
        """Up to `most` of `items`, each perhaps several times."""
        return [self.pick(items) for _ in range(self.below(most + 1))]

    def one_in(self, n: int) -> bool:
        """True once in `n` times."""
        return not self.below(n)
