"""Load GGUF files on several ranks of `torch.distributed`. Each rank reads its part, and shared tensors are read once.

No rank sends tensors before all ranks have agreed on the file and the plan. No rank sends those of a batch before all
have read them and have memory for what they receive, and no rank returns before all have dequantized. So an error on
one rank becomes an error on all ranks, and no rank waits for another one that has failed.
"""

from __future__ import annotations

import hashlib
import platform
from collections import defaultdict
from collections.abc import Callable, Mapping
from contextlib import ExitStack, suppress
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from numba_dequant.arguments import flag_option
from numba_dequant.backends.devices import gpu_device
from numba_dequant.backends.nvlink import Links, are_connected, links_of
from numba_dequant.dtypes import DEFAULT
from numba_dequant.errors import DeviceError, OptionError, ReadError, ShapeError, shown
from numba_dequant.format import Format
from numba_dequant.formats import FORMATS, format_named
from numba_dequant.gguf.tensors import TensorInfo
from numba_dequant.loading.chunks import Chunk, TensorSlice
from numba_dequant.loading.files import OpenFiles
from numba_dequant.loading.groups import LoadGroups
from numba_dequant.loading.parts import PartReader
from numba_dequant.loading.requests import Request, dtype_resolver
from numba_dequant.model import Model
from numba_dequant.model import open as open_model
from numba_dequant.parallel import Placement, Plan, Replicate, Shard, plan
from numba_dequant.parallel.placements import checked_rules
from numba_dequant.parallel.routes import Read, Routes, Share, shares_of
from numba_dequant.parallel.spans import places_of
from numba_dequant.torch.checks import DTYPES
from numba_dequant.torch.functional import resolved
from numba_dequant.torch.loading import blocks_shape, dequantize_own, load_groups, request_of, tensor_of
from numba_dequant.torch.ranks import Exchange, Ranks, device_of, told

Planner = Plan | Callable[[Model], Plan]

AHEAD = 6
"""The number of batches that are read ahead."""


def load_sharded(
    path: Any, device: Any, dtype: Any, planner: Any, group: Any, *, select: Any = None, keep_quantized: Any
) -> dict[str, Tensor]:
    """The tensors of this rank by the plan; see `load_file`. A wrong argument of one rank is an error on all ranks."""
    if not dist.is_available() or not dist.is_initialized():
        raise OptionError("a plan needs a process group; call torch.distributed.init_process_group first")
    ranks = Ranks(group)
    with ranks.all_or_none("begin its load") as agreement:
        if planner is None:
            raise OptionError(
                "group is passed without plan, so nothing says which rank holds what; pass plan, or omit group to load "
                "all tensors on this rank"
            )
        if not isinstance(planner, Plan) and not callable(planner):
            raise OptionError(f"plan must be a Plan or a function that returns one for a model, got {shown(planner)}")
        if select is not None:
            raise OptionError(
                "select cannot be combined with plan, which says which tensors each rank holds; omit select"
            )
        kept = flag_option("keep_quantized", keep_quantized)
        device = _usable(device)
        type_of = dtype_resolver(dtype)
        model, missing = _opened(path)
        agreement.mine = None if model is None else (_host(), _links(ranks, device))
    hosts: list[str | None] = [each and each[0] for each in agreement.of_all]
    if missing is not None and not any(hosts):
        raise missing
    is_linked = len(set(hosts)) == 1 and are_connected([links for _, links in agreement.of_all])
    with ExitStack() as stack:
        load = _Load(ranks, device, type_of, is_kept=kept)
        stack.callback(load.close)
        with ranks.all_or_none("begin its load") as agreement:
            if model is not None:
                shares = _shares(planner if isinstance(planner, Plan) else planner(model), model, ranks.count)
                # Reading begins while the ranks agree. No rank sends before they have.
                places = places_of(model.tensors.values())
                load.begin(model, Routes(shares, hosts, places=places, gathers_parts=is_linked))
                agreement.mine = _digest(model), _digest_of_shares(shares)
        first = _same(model, agreement.of_all)
        if None in hosts:
            shares = ranks.broadcast(None if model is None else shares, first)
            if model is None:
                load.begin(None, Routes(shares, hosts))
        return load.finish()


class _Load:
    """The load of this rank.

    Args:
        ranks: the ranks.
        device: the device of the results.
        type_of: output type of a tensor by its name.
        is_kept: whether blocks stay compressed.
    """

    def __init__(self, ranks: Ranks, device: torch.device, type_of: Callable[[str], Any], *, is_kept: bool) -> None:
        self._ranks, self._device, self._type_of, self._is_kept = ranks, device, type_of, is_kept
        self._place = device if device.type in ("cpu", "cuda") else torch.device("cpu")
        between = device_of(ranks.group, device)
        self._between = self._place if between.type == self._place.type else between
        self._reader: PartReader | None = None

    def begin(self, model: Model | None, routes: Routes) -> None:
        """Begin to read the first batches, if this rank has the file."""
        self._routes, rank = routes, self._ranks.rank
        self._shares = {share.name: share for share in routes.shares[rank]}
        if model is None:
            return

        def load_on(device: torch.device) -> LoadGroups:
            return partial(load_groups, device=device, sharers=routes.hosts.count(routes.hosts[rank]))

        own = load_on(self._place)
        pieces = own if self._between == self._place else load_on(self._between)
        self._reader = PartReader(model.tensors, routes, rank, self._own, own, pieces)
        for _ in range(min(AHEAD, routes.n_batches + 1)):
            self._reader.begin()

    def _dtype(self, fmt: Format, name: str) -> torch.dtype | None:
        """The dtype of a tensor; None for blocks."""
        if self._is_kept and fmt.block_size > 1:
            return None
        return resolved(fmt, self._type_of(name) or torch.get_default_dtype())[1]

    def _own(self, part: TensorInfo) -> Request:
        return request_of(part, self._dtype(part.format, part.name), self._place)

    def finish(self) -> dict[str, Tensor]:
        """Read all batches, exchange them, and return what this rank holds."""
        ranks, routes = self._ranks, self._routes
        exchange = Exchange(ranks, routes, self._between)
        empty = torch.empty(0, dtype=torch.uint8, device=self._place)
        received = {name: empty for name, share in self._shares.items() if not share.n_bytes}
        found: dict[str, Tensor] = {}
        for batch in range(routes.n_batches):
            with ranks.all_succeed("load its part"):
                found |= self._values(received)
                own, pieces = self._read(batch)
                found |= own
                memory = exchange.memory(batch)
            received = exchange.run(batch, pieces, memory)
        with ranks.all_succeed("load its part"):
            found |= self._values(received)
            found |= self._read(routes.n_batches)[0]
        return {name: found[name] for name in self._shares}

    def _read(self, batch: int) -> tuple[dict[str, Tensor], dict[Read, Tensor]]:
        """Own tensors of a batch, and what is exchanged. The reads of a later batch begin."""
        if self._reader is None:
            return {}, {}
        own, pieces = self._reader.finish(batch)
        if batch + AHEAD <= self._routes.n_batches:
            self._reader.begin()
        return (
            {name: tensor_of(result).to(self._device) for name, result in own.items()},
            {each: _as_tensor(data) for each, data in pieces.items()},
        )

    def _values(self, received: dict[str, Tensor]) -> dict[str, Tensor]:
        """The tensors of what this rank has received: blocks, or values, which take one launch for each format."""
        found: dict[str, Tensor] = {}
        jobs: dict[str, dict[str, tuple[Tensor, Format, Tensor]]] = defaultdict(dict)
        for name, raw in received.items():
            share = self._shares[name]
            fmt = format_named(share.format)
            dtype, data = self._dtype(fmt, name), raw.reshape(-1).to(self._place)
            if dtype is None:
                is_apart = data.untyped_storage().nbytes() == data.nbytes
                found[name] = (data if is_apart else data.clone()).view(blocks_shape(fmt, share.shape))
                continue
            found[name] = torch.empty(share.shape, dtype=dtype, device=self._place)
            if share.n_bytes:
                jobs[DTYPES.get(dtype, DEFAULT)][name] = data, fmt, found[name]
        for output, tensors in jobs.items():
            dequantize_own(tensors, output, self._place)
        return {name: tensor.to(self._device) for name, tensor in found.items()}

    def close(self) -> None:
        """Stop reading."""
        if self._reader is not None:
            self._reader.close()


def _as_tensor(data: Any) -> Tensor:
    """An array of a load as a tensor that shares its memory."""
    return torch.from_numpy(data) if isinstance(data, np.ndarray) else data


def _usable(device: Any) -> torch.device:
    """The device as PyTorch's. Raises DeviceError if PyTorch cannot use it."""
    try:
        return torch.empty(0, device=torch.device(device)).device
    except Exception as error:  # the error depends on how PyTorch was built
        raise DeviceError(
            f"device {shown(device)} cannot be used: {told(error)}; pass 'cpu' or a device that PyTorch finds"
        ) from error


def load_dtensors(path: Any, dtype: Any, mesh: Any, placements: Any, *, keep_quantized: Any) -> dict[str, Tensor]:
    """The tensors as DTensors of a mesh; see `load_file`."""
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor

    if not isinstance(mesh, DeviceMesh):
        raise OptionError(
            f"device_mesh must be a DeviceMesh of one dimension, got {shown(mesh)}; pass the result of init_device_mesh"
        )
    if mesh.ndim != 1:
        raise OptionError(f"the mesh has {mesh.ndim} dimensions, not 1; pass one of them, such as mesh['tp']")
    group = mesh.get_group()
    with Ranks(group).all_or_none("use its arguments"):
        if not isinstance(placements, Mapping):
            raise OptionError(f"placements must be a mapping, glob -> Shard or Replicate, got {shown(placements)}")
        rules = checked_rules((pattern, _placement(pattern, given)) for pattern, given in placements.items())

    def equal_parts(model: Model) -> Plan:
        found = plan(model.tensors.values(), mesh.size(), rules)
        if found.notes:  # they say which tensors have unequal parts
            raise ShapeError(f"{found.notes[0]}, but a DTensor needs equal parts; pass plan instead of device_mesh")
        return found

    found = load_sharded(path, mesh.device_type, dtype, equal_parts, group, keep_quantized=keep_quantized)

    def wrapped(name: str, local: Tensor) -> Tensor:
        placement = next((each for pattern, each in rules if fnmatchcase(name, pattern)), Replicate())
        dim = None if isinstance(placement, Replicate) else placement.dim % local.ndim
        of_pytorch = dist.tensor.Replicate() if dim is None else dist.tensor.Shard(dim)
        result: Tensor = DTensor.from_local(local, mesh, [of_pytorch], run_check=False)
        return result

    return {name: wrapped(name, local) for name, local in found.items()}


def _placement(pattern: str, given: Any) -> Placement:
    """Our placement for PyTorch's placement, which may be the only item of a list."""
    one = given[0] if isinstance(given, (list, tuple)) and len(given) == 1 else given
    if isinstance(one, dist.tensor.Replicate):
        return Replicate()
    if isinstance(one, dist.tensor.Shard):
        return Shard(one.dim)
    raise OptionError(
        f"the placement of {pattern!r} is {shown(given)}; pass a Shard or a Replicate of torch.distributed.tensor for "
        "each pattern"
    )


def _opened(path: Any) -> tuple[Model | None, FileNotFoundError | None]:
    """The model, or the error that there is no such file."""
    try:
        return open_model(path), None
    except FileNotFoundError as error:
        return None, error


def _same(model: Model | None, digests: list[tuple[bytes, bytes] | None]) -> int:
    """The first rank that has the file, after a check that all ranks have the same file and plan.

    Args:
        model: that of this rank.
        digests: of each rank, digests of the file and of the plan; None if it does not have the file.

    Raises:
        ReadError: the files of two ranks differ.
        OptionError: the plans of two ranks differ.
    """
    holders = {rank: each for rank, each in enumerate(digests) if each is not None}
    (first, (of_file, of_plan)), *others = holders.items()
    where = next((tensor.path for tensor in model.tensors.values()), "") if model is not None else ""
    for rank, (file, planned) in others:
        if file != of_file:
            sentence = f"the files of rank {first} and rank {rank} differ; use the same file on both"
            raise ReadError(where or "the model", None, None, sentence)
        if planned != of_plan:
            raise OptionError(f"the plans of rank {first} and rank {rank} differ; make the same plan on all ranks")
    return first


def _links(ranks: Ranks, device: torch.device) -> Links | None:
    """The links of the GPU to which this rank loads, if it sends from there."""
    if device.type != "cuda" or device_of(ranks.group, device).type != "cuda":
        return None
    return links_of(gpu_device(device.index).index)


def _host() -> str:
    """Text that is the same for processes that see the same disks: the name of the host, and when it was started."""
    boot = ""
    with suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text()
    return f"{platform.node()} {boot}"


def _digest(model: Model) -> bytes:
    """A digest of the headers: all bytes before the first tensor of each shard, and thus the table of tensors.

    The names of formats are part of it, because the header has only ids, which a program may give to its own formats.
    """
    digest = hashlib.sha256()  # many processors have instructions for it
    digest.update("\n".join(tensor.format.name for tensor in model.tensors.values()).encode())
    firsts: dict[str, TensorInfo] = {}
    for tensor in model.tensors.values():
        if tensor.path not in firsts or tensor.offset < firsts[tensor.path].offset:
            firsts[tensor.path] = tensor
    with OpenFiles() as files:
        for _, tensor in sorted(firsts.items()):
            header = tensor._replace(offset=0, n_bytes=tensor.offset, format=FORMATS["I8"], byte_order="little")
            chunk = Chunk(tensor.path, 0, tensor.offset, [TensorSlice(0, 0, 0, tensor.offset)])
            digest.update(files.read(chunk, [header], np.empty(tensor.offset, np.uint8)).data)
    return digest.digest()


def _digest_of_shares(shares: list[list[Share]]) -> bytes:
    """A digest of what the ranks hold of tensors that are the same on all of them."""
    numbers = [
        (rank, share.number, -1 if share.dim is None else share.dim, share.start, share.stop)
        for rank, of_rank in enumerate(shares)
        for share in of_rank
    ]
    return hashlib.sha256(np.array(numbers, np.int64).tobytes()).digest()


def _shares(given: Any, model: Model, count: int) -> list[list[Share]]:
    if not isinstance(given, Plan):
        raise OptionError(f"the function that was passed as plan returned {shown(given)}, but must return a Plan")
    if len(given.ranks) != count:
        raise OptionError(f"the plan is for {len(given.ranks)} ranks, but the group has {count}; pass {count} as world")
    return shares_of(given, model.tensors)
