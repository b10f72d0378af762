"""The primitives of `halves.py` that many threads execute together, or that copy, on Numba's CUDA target.

They need compute capability 8.0 or higher. Those for copies with a barrier and for kernels that overlap need 9.0 or
higher. Those for panels use `wgmma`, which only compute capability 9.0 has.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from llvmlite import ir
from numba.core import types

from numba_dequant import halves
from numba_dequant.kernels import intrinsics
from numba_dequant.kernels.intrinsics import BYTE, EIGHT, FLOAT, LONG, WORD, pointer_at
from numba_dequant.kernels.intrinsics_cuda import FOUR_WORDS, GLOBAL_MEMORY, instruction, target
from numba_dequant.kernels.intrinsics_halves import HALVES, words_of
from numba_dequant.kernels.numba_cuda import extending

MMA_OF_SUMS = (
    "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {$0,$1,$2,$3}, {$4,$5,$6,$7}, {$8,$9}, {$10,$11,$12,$13};"
)
MMA = "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {$0,$1,$2,$3}, {$4,$5,$6,$7}, {$8,$9}, {$10,$11,$12,$13};"


class Sums(types.Type):
    """The Numba type of the results of a thread, four for every 8 columns."""

    def __init__(self, tiles: int) -> None:
        self.tiles = tiles
        super().__init__(f"Sums({tiles})")


FOUR_NUMBERS: Any = getattr(types, "UniTuple")(types.float32, 4)  # noqa: B009 its stubs do not have it


class _SumsModel(extending.core_models.PrimitiveModel):  # type: ignore[misc]
    def __init__(self, manager: Any, numba_type: Any) -> None:
        super().__init__(manager, numba_type, ir.VectorType(FLOAT, 4 * numba_type.tiles))


extending.register_model(Sums)(_SumsModel)


def _no_sums(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Any) -> Any:
    n_results = 4 * signature.return_type.tiles
    return ir.Constant(ir.VectorType(FLOAT, n_results), [FLOAT(0)] * n_results)


def _multiply(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Any) -> Any:
    sums, upper, lower, x, at, step, _ = arguments
    base = intrinsics.data_pointer(context, builder, signature.args[3], x)
    above, below = words_of(builder, upper), words_of(builder, lower)
    for tile in range(signature.args[0].tiles):
        start = builder.add(at, builder.mul(step, LONG(tile)))
        column = words_of(builder, builder.load(pointer_at(builder, base, start, FOUR_WORDS), align=16))
        for first in (0, 2):
            weights = above[first], below[first], above[first + 1], below[first + 1]
            sums = _mma(builder, sums, tile, weights, column[first:], MMA)
    return sums


def _mma(builder: ir.IRBuilder, sums: Any, tile: int, weights: Sequence[Any], column: Sequence[Any], text: str) -> Any:
    before = [builder.extract_element(sums, WORD(4 * tile + k)) for k in range(4)]
    function = ir.FunctionType(ir.LiteralStructType([FLOAT] * 4), [WORD] * 6 + [FLOAT] * 4)
    constraints = ",".join(["=f"] * 4 + ["r"] * 6 + ["f"] * 4)
    after = builder.asm(function, text, constraints, [*weights, *column[:2], *before], side_effect=False)
    after.attributes.add("readnone")
    after.attributes.add("convergent")
    for k in range(4):
        sums = builder.insert_element(sums, builder.extract_value(after, k), WORD(4 * tile + k))
    return sums


def _wgmma(builder: ir.IRBuilder, sums: list[Any], weights: Sequence[Any], panel: Any, is_first: bool) -> list[Any]:
    """Add the products of 64 rows and all columns over 16 elements to the results, or to 0."""
    n, first = len(sums), len(sums) if is_first else 2 * len(sums)
    results = ",".join(f"${k}" for k in range(n))
    a = ",".join(f"${first + k}" for k in range(4))
    product = f"wgmma.mma_async.sync.aligned.m64n{2 * n}k16.f32.f16.f16"
    text = (
        f"{{.reg .pred adds; setp.ne.b32 adds, {int(not is_first)}, 0; "
        f"{product} {{{results}}}, {{{a}}}, ${first + 4}, adds, 1, 1, 0;}}"
    )
    given = [*([] if is_first else sums), *weights, panel]
    constraints = ",".join(["=f"] * n + [str(k) for k in range(first - n)] + ["r"] * 4 + ["l"])
    function = ir.FunctionType(ir.LiteralStructType([FLOAT] * n), [argument.type for argument in given])
    after = builder.asm(function, text, f"{constraints},~{{memory}}", given, side_effect=True)
    return [builder.extract_value(after, k) for k in range(n)]


def _packed(builder: ir.IRBuilder, results: Sequence[Any]) -> Any:
    vector: Any = ir.Constant(ir.VectorType(FLOAT, len(results)), ir.Undefined)
    for k, result in enumerate(results):
        vector = builder.insert_element(vector, result, WORD(k))
    return vector


def _unpacked(builder: ir.IRBuilder, vector: Any) -> list[Any]:
    return [builder.extract_element(vector, WORD(k)) for k in range(vector.type.count)]


def _panel_multiplier(is_first: bool) -> intrinsics.Codegen:
    def multiply_panel(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Any) -> Any:
        sums, upper, lower, x, at, _ = arguments
        sums, above, below = _unpacked(builder, sums), words_of(builder, upper), words_of(builder, lower)
        start = builder.ptrtoint(_shared(context, builder, signature.args[3], x, at), WORD)
        # Of the elements in shared memory, those of 8 columns and 8 elements take 128 bytes. The next 8 columns are 128
        # bytes away, and the next 8 elements `step`.
        step = 16 * 2 * len(sums)
        layout = step >> 4 << 16 | 128 >> 4 << 32
        panel = builder.or_(builder.lshr(builder.zext(start, LONG), LONG(4)), LONG(layout))
        _effect(builder, "wgmma.fence.sync.aligned;")
        for first in (0, 2):
            weights = above[first], below[first], above[first + 1], below[first + 1]
            sums = _wgmma(builder, sums, weights, builder.add(panel, LONG(first * step >> 4)), is_first and not first)
        _effect(builder, "wgmma.commit_group.sync.aligned;")
        return _packed(builder, sums)

    return multiply_panel


def _wait_for_panels(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Any) -> Any:
    before = _unpacked(builder, arguments[0])
    n = len(before)
    function = ir.FunctionType(ir.LiteralStructType([FLOAT] * n), [FLOAT] * n)
    constraints = ",".join(["=f"] * n + [str(k) for k in range(n)])
    text = "wgmma.wait_group.sync.aligned 0;"
    after = builder.asm(function, text, f"{constraints},~{{memory}}", before, side_effect=True)
    return _packed(builder, [builder.extract_value(after, k) for k in range(n)])


def _make_barrier(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Any) -> Any:
    place = builder.ptrtoint(_shared(context, builder, signature.args[0], *arguments), WORD)
    _effect(builder, "mbarrier.init.shared::cta.b64 [$0], 1;", "r,~{memory}", [place])
    _effect(builder, "fence.proxy.async.shared::cta;")  # the unit that copies sees it
    return context.get_dummy_value()


def _begin_copy(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Any) -> Any:
    tile, at, _, address, n_bytes, barrier = arguments
    target = builder.ptrtoint(_shared(context, builder, signature.args[0], tile, at), WORD)
    place = builder.ptrtoint(_shared(context, builder, signature.args[0], tile, barrier), WORD)
    _effect(builder, "mbarrier.arrive.expect_tx.shared::cta.b64 _, [$0], $1;", "r,r,~{memory}", [place, n_bytes])
    copy = "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [$0], [$1], $2, [$3];"
    _effect(builder, copy, "r,l,r,r,~{memory}", [target, address, n_bytes, place])
    return context.get_dummy_value()


def _wait_for_copy(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Any) -> Any:
    tile, barrier, parity = arguments
    place = builder.ptrtoint(_shared(context, builder, signature.args[0], tile, barrier), WORD)
    wait = "mbarrier.try_wait.parity.shared::cta.b64 arrived, [$0], $1;"
    text = "{ .reg .pred arrived; again: " + wait + " @!arrived bra again; }"
    _effect(builder, text, "r,r,~{memory}", [place, parity])
    return context.get_dummy_value()


def _add_scaled(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Any) -> Any:
    sums, more, upper, lower = arguments
    for k in range(4 * signature.args[0].tiles):
        operands = [builder.extract_element(more, WORD(k)), lower if k & 2 else upper]
        operands.append(builder.extract_element(sums, WORD(k)))
        value = instruction(builder, "fma.rn.f32 $0, $1, $2, $3;", FLOAT, "=f,f,f,f", operands)
        sums = builder.insert_element(sums, value, WORD(k))
    return sums


def _store_sums(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Any) -> Any:
    out, at, sums, step = arguments
    base = intrinsics.data_pointer(context, builder, signature.args[0], out)
    for k in range(4 * signature.args[2].tiles):
        place = pointer_at(builder, base, builder.add(at, builder.mul(step, LONG(k))), FLOAT)
        builder.store(builder.extract_element(sums, WORD(k)), place, align=4)
    return context.get_dummy_value()


def _add_stored_sums(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Any) -> Any:
    sums, data, at, step = arguments
    start = builder.add(builder.ptrtoint(intrinsics.data_pointer(context, builder, signature.args[1], data), LONG), at)
    # All loads are begun before the first sum. They bypass the L1 cache, which does not see other multiprocessors.
    function = ir.FunctionType(FLOAT, [LONG])
    others = [
        builder.asm(
            function, "ld.global.cg.f32 $0, [$1];", "=f,l,~{memory}",
            [builder.add(start, builder.mul(step, LONG(k)))], side_effect=True,
        )
        for k in range(4 * signature.args[0].tiles)
    ]  # fmt: skip
    return _packed(
        builder, [builder.fadd(result, other) for result, other in zip(_unpacked(builder, sums), others, strict=True)]
    )


def _flag(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Any) -> Any:
    flags, index = arguments
    base = builder.ptrtoint(intrinsics.data_pointer(context, builder, signature.args[0], flags), LONG)
    return builder.add(base, builder.mul(index, LONG(4)))


def _raise_flag(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Any) -> Any:
    place = _flag(context, builder, signature, arguments)
    _effect(builder, "st.release.gpu.global.u32 [$0], 1;", "l,~{memory}", [place])
    return context.get_dummy_value()


def _wait_for_flag(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Any) -> Any:
    place = _flag(context, builder, signature, arguments)
    wait = "ld.acquire.gpu.global.u32 seen, [$0]; setp.eq.u32 is_down, seen, 0; @is_down bra again;"
    _effect(builder, "{ .reg .pred is_down; .reg .u32 seen; again: " + wait + " }", "l,~{memory}", [place])
    return context.get_dummy_value()


def _item(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Any) -> Any:
    return builder.extract_element(arguments[0], arguments[1])


def _repeated(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Any) -> Any:
    return intrinsics.broadcast(builder, arguments[0])


def _multiply_sums(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Any) -> Any:
    sums, minima, x, at, step, _ = arguments
    base = intrinsics.data_pointer(context, builder, signature.args[2], x)
    weights = [builder.bitcast(builder.extract_value(minima, k), WORD) for k in range(4)]
    for tile in range(signature.args[0].tiles):
        start = builder.add(at, builder.mul(step, LONG(tile)))
        column = words_of(builder, builder.load(pointer_at(builder, base, start, FOUR_WORDS), align=16))
        for first in (0, 2):
            sums = _mma(builder, sums, tile, weights, column[first:], MMA_OF_SUMS)
    return sums


def _plus_lane(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Any) -> Any:
    value, distance, _ = arguments
    function = ir.FunctionType(WORD, [WORD, WORD])
    exchange = "shfl.sync.bfly.b32 $0, $1, $2, 31, 0xffffffff;"
    other = builder.asm(function, exchange, "=r,r,r", [builder.bitcast(value, WORD), distance], side_effect=True)
    return builder.fadd(value, builder.bitcast(other, FLOAT))


def _store_sum(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Any) -> Any:
    out, at, value = arguments
    base = intrinsics.data_pointer(context, builder, signature.args[0], out)
    upper = builder.bitcast(builder.and_(builder.bitcast(value, WORD), WORD(0xFFFFE000)), FLOAT)
    builder.store(upper, pointer_at(builder, base, at, FLOAT), align=4)
    lower = builder.fsub(value, upper)
    builder.store(lower, pointer_at(builder, base, builder.add(at, LONG(8)), FLOAT), align=4)
    return context.get_dummy_value()


def _effect(builder: ir.IRBuilder, text: str, constraints: str = "~{memory}", arguments: Sequence[Any] = ()) -> None:
    function = ir.FunctionType(ir.VoidType(), [argument.type for argument in arguments])
    builder.asm(function, text, constraints, list(arguments), side_effect=True)


def _copy_pieces(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Any) -> Any:
    tile, at, _, address, quarter, pieces = arguments
    shared = _shared(context, builder, signature.args[0], tile, at)
    for step in range(MOST_PIECES // 4):
        with builder.if_then(builder.icmp_unsigned("<", builder.add(quarter, WORD(4 * step)), pieces)):
            target = builder.ptrtoint(builder.gep(shared, [LONG(64 * step)]), WORD)
            source = builder.add(address, LONG(64 * step))
            _effect(builder, "cp.async.cg.shared.global [$0], [$1], 16;", "r,l,~{memory}", [target, source])
    return context.get_dummy_value()


def _copy_pieces_or_zeros(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Any) -> Any:
    tile, at, data, address, n_bytes, quarter, pieces = arguments
    shared = _shared(context, builder, signature.args[0], tile, at)
    data = builder.ptrtoint(intrinsics.data_pointer(context, builder, signature.args[2], data), LONG)
    # At most one piece of this thread is copied in part.
    rest = builder.and_(n_bytes, WORD(63))
    cut = builder.ashr(n_bytes, WORD(6))
    is_cut = builder.and_(builder.icmp_signed(">", rest, WORD(0)), builder.icmp_signed("<", rest, WORD(16)))
    is_there = builder.icmp_signed("<", builder.add(quarter, builder.shl(cut, WORD(2))), pieces)
    is_cut = builder.and_(builder.and_(is_cut, builder.icmp_signed(">=", cut, WORD(0))), is_there)
    for step in range(MOST_PIECES // 4):
        is_given = builder.icmp_unsigned("<", builder.add(quarter, WORD(4 * step)), pieces)
        is_whole = builder.not_(builder.and_(is_cut, builder.icmp_signed("==", cut, WORD(step))))
        with builder.if_then(builder.and_(is_given, is_whole)):
            target = builder.ptrtoint(builder.gep(shared, [LONG(64 * step)]), WORD)
            is_data = builder.icmp_signed(">", n_bytes, WORD(64 * step))
            size = builder.select(is_data, WORD(16), WORD(0))
            # If nothing is copied, the address must still be valid.
            source = builder.select(is_data, builder.add(address, LONG(64 * step)), data)
            source = builder.and_(source, LONG(-16))
            text = "cp.async.cg.shared.global [$0], [$1], 16, $2;"
            _effect(builder, text, "r,l,r,~{memory}", [target, source, size])
    with builder.if_then(is_cut, likely=False):
        start = builder.sext(builder.shl(cut, WORD(6)), LONG)
        source = builder.inttoptr(builder.add(address, start), ir.PointerType(BYTE, GLOBAL_MEMORY))
        piece = _first_bytes(builder, source, rest)
        target = builder.bitcast(builder.gep(shared, [start]), ir.PointerType(FOUR_WORDS, 3))
        builder.store(piece, target, align=16)
    return context.get_dummy_value()


def _first_bytes(builder: ir.IRBuilder, source: Any, count: Any) -> Any:
    """Sixteen bytes: the first `count` from memory, then zeros. No other byte is read.

    `cp.async` would read all sixteen, whatever part of them it is told to copy.
    """
    piece = ir.Constant(FOUR_WORDS, [WORD(0)] * 4)
    for k in range(4):
        word = WORD(0)
        for byte in range(4):
            is_data = builder.icmp_signed(">", count, WORD(4 * k + byte))
            place = builder.select(is_data, LONG(4 * k + byte), LONG(0))
            value = builder.zext(builder.load(builder.gep(source, [place]), align=1), WORD)
            value = builder.select(is_data, builder.shl(value, WORD(8 * byte)), WORD(0))
            word = builder.or_(word, value)
        piece = builder.insert_element(piece, word, WORD(k))
    return piece


def _shared(context: Any, builder: ir.IRBuilder, numba_type: Any, tile: Any, at: Any) -> Any:
    """Byte `at` of an array in shared memory."""
    pointer = intrinsics.data_pointer(context, builder, numba_type, tile)
    return builder.addrspacecast(builder.gep(pointer, [at]), ir.PointerType(BYTE, 3))


MOST_PIECES = 40
"""Maximum 16-byte pieces of a chunk, a multiple of four.

A chunk has at most 512 weights of 9.125 bits, and up to 15 bytes of a piece precede it.
"""


def _plain_effect(text: str) -> intrinsics.Codegen:
    def codegen(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Any) -> Any:
        _effect(builder, text)
        return context.get_dummy_value()

    return codegen


MOST_GROUPS = 8


def _wait_for_groups(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Any) -> Any:
    # The number is part of the instruction. It is constant where this is used, so one of these cases remains.
    for n in range(MOST_GROUPS):
        with builder.if_then(builder.icmp_unsigned("==", arguments[0], WORD(n))):
            _effect(builder, f"cp.async.wait_group {n};")
    return context.get_dummy_value()


def _address_of(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Any) -> Any:
    return builder.ptrtoint(intrinsics.data_pointer(context, builder, signature.args[0], arguments[0]), LONG)


def _like_sums(sums: Any, *others: Any) -> Any:
    """The signature of a function that returns the type of its first argument."""
    return sums(sums, *others)


PANEL_PARAMETERS = (None, HALVES, HALVES, None, types.int64, types.int64)

for _function, _result, _kinds, _codegen in (
    (halves.no_sums_8, Sums(1), (), _no_sums),
    (halves.no_sums_16, Sums(2), (), _no_sums),
    (halves.no_sums_32, Sums(4), (), _no_sums),
    (halves.no_sums_64, Sums(8), (), _no_sums),
    (halves.no_sums_128, Sums(16), (), _no_sums),
    (halves.multiply, _like_sums, (None, HALVES, HALVES, None, types.int64, types.int64, types.int64), _multiply),
    (
        halves.multiply_sums,
        _like_sums,
        (None, FOUR_NUMBERS, None, types.int64, types.int64, types.int64),
        _multiply_sums,
    ),
    (halves.multiply_panel, _like_sums, PANEL_PARAMETERS, _panel_multiplier(is_first=False)),
    (halves.multiply_first_panel, _like_sums, PANEL_PARAMETERS, _panel_multiplier(is_first=True)),
    (halves.wait_for_panels, _like_sums, (None,), _wait_for_panels),
    (halves.make_barrier, types.none, (None, types.int64), _make_barrier),
    (
        halves.begin_copy,
        types.none,
        (None, types.int64, None, types.int64, types.int32, types.int64),
        _begin_copy,
    ),
    (halves.wait_for_copy, types.none, (None, types.int64, types.int32), _wait_for_copy),
    (halves.plus_lane, types.float32, (types.float32, types.int32, types.int64), _plus_lane),
    (halves.store_sum, types.none, (None, types.int64, types.float32), _store_sum),
    (halves.add_scaled, _like_sums, (None, None, types.float32, types.float32), _add_scaled),
    (halves.store_sums, types.none, (None, types.int64, None, types.int64), _store_sums),
    (halves.add_stored_sums, _like_sums, (None, None, types.int64, types.int64), _add_stored_sums),
    (halves.raise_flag, types.none, (None, types.int64), _raise_flag),
    (halves.wait_for_flag, types.none, (None, types.int64), _wait_for_flag),
    (halves.let_copies_overwrite, types.none, (), _plain_effect("fence.proxy.async.shared::cta;")),
    (halves.item, types.float32, (None, types.int32), _item),
    (halves.repeated, EIGHT, (types.float32,), _repeated),
    (halves.copy_pieces, types.none, (None, types.int64, None, types.int64, types.int32, types.int32), _copy_pieces),
    (
        halves.copy_pieces_or_zeros,
        types.none,
        (None, types.int64, None, types.int64, types.int32, types.int32, types.int32),
        _copy_pieces_or_zeros,
    ),
    (halves.end_group, types.none, (), _plain_effect("cp.async.commit_group;")),
    (halves.wait_for_groups, types.none, (types.int32,), _wait_for_groups),
    (halves.address_of, types.int64, (None,), _address_of),
    (halves.let_next_kernel_start, types.none, (), _plain_effect("griddepcontrol.launch_dependents;")),
    (halves.wait_for_earlier_kernels, types.none, (), _plain_effect("griddepcontrol.wait;")),
    (halves.synchronize_warp, types.none, (types.int64,), _plain_effect("bar.warp.sync 0xffffffff;")),
):
    intrinsics.register_primitive(target, _function, _result, _kinds, _codegen)
