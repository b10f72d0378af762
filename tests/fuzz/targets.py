"""All targets by name."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress

import commands
import computing
import loading
import passing
import planning
import reading
import replacing
import selecting
import splitting
from computing import FORMATS, Scope

__all__ = ["FORMATS", "TARGETS", "Scope"]

TARGETS: dict[str, Callable[[bytes], str]] = {
    "header": reading.header,
    "files": reading.files,
    "shards": splitting.shards,
    "strings": passing.strings,
    "arrays": passing.arrays,
    "selection": selecting.selection,
    "loads": loading.loads,
    "batches": computing.batches,
    "products": computing.products,
    "plans": planning.plans,
    "readers": replacing.readers,
    "commands": commands.commands,
}

with suppress(ImportError):  # PyTorch is optional
    import modules
    import operators

    TARGETS["operators"] = operators.operators
    TARGETS["modules"] = modules.modules
