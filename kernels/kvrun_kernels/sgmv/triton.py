"""Low-rank updates on GPUs: first every x @ a.T, by tiles of rows and ranks, then every update of y."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvrun_kernels.sgmv.table import ENTRY, INPUTS, PART, PARTS, TILE, WIDEST, LoraUse
from kvrun_kernels.tiles import TYPES, owner, product, rounded

CUT = 1024  # inputs of one program: a constant, so that a row's sums are formed in one order in every batch
PROGRAMS = 1024  # that a GPU wants at least, about eight small ones for each processor of a large one

_TILE, _PART, _ENTRY = tl.constexpr(TILE), tl.constexpr(PART), tl.constexpr(ENTRY)

# Numbers that differ from step to step, or from linear to linear, for which nothing is compiled again.
_OF_A_STEP = ["owners", "tokens", "offsets", "known", "site", "groups", "rows", "spread", "parts", "chunks", "stretches"]


@triton.jit
def _tile(tile, tiles, owners, known, tokens, offsets, groups, rows, spread, MADE: tl.constexpr, GROUPED: tl.constexpr):
    """Of a tile of rows: them, which are there, the adapter of each, its number among the tile's, how many there are, and the group."""
    at = tl.arange(0, _TILE)
    if MADE:
        # The table knows the rows that these were made of: whose they are is found here.
        if GROUPED:
            group, start = owner(offsets, groups, tile // spread, _TILE)
            stop = tl.load(offsets + group + 1)
        else:
            group, start, stop = tile * 0, (tile // spread * _TILE).to(tl.int64), rows
        row = start + at
        mine = row < stop
        token = tl.load(tokens + row, mine, other=known)
        who = tl.load(owners + token, mine & (token < known), other=0)
        before = tl.load(tokens + row - 1, mine & (at > 0), other=known)
        other = who != tl.load(owners + before, mine & (at > 0) & (before < known), other=0)
        number = tl.cumsum((other & (at > 0)).to(tl.int32), 0)
        count = tl.max(tl.where(mine, number, -1), 0) + 1
    else:
        entry = tiles + tile * _ENTRY
        group, row = tile * 0, tl.load(entry) + at
        mine = at < tl.load(entry + 1)
        who = tl.where(mine, tl.load(entry + 2), 0)
        number, count = at * 0, 1
    return row, mine, who, number, count, group


@triton.jit
def _pointer(number, DTYPE: tl.constexpr, ALIGNED: tl.constexpr):
    found = number.to(tl.pointer_type(DTYPE))
    return tl.multiple_of(found, 16) if ALIGNED else found


@triton.jit(do_not_specialize=_OF_A_STEP)
def _shrink(
    inner, x, tiles, owners, known, tokens, offsets, sites, site, groups, rows, spread, parts, chunks, inputs, x_stride, cut, room,
    DTYPE: tl.constexpr, ALIGNED: tl.constexpr, MADE: tl.constexpr, GROUPED: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    tile, stretch = tl.program_id(0), tl.program_id(1)
    part, chunk = tl.program_id(2) // chunks, tl.program_id(2) % chunks
    row, mine, who, number, count, group = _tile(tile, tiles, owners, known, tokens, offsets, groups, rows, spread, MADE, GROUPED)
    if GROUPED:
        site = tl.load(sites + group)
    at = tl.arange(0, _TILE)
    for n in range(tile % spread, count, spread):
        of = mine & (number == n)
        adapter = tl.max(tl.where(of, who, 0), 0)
        if adapter != 0:
            pointers = adapter.to(tl.pointer_type(tl.int64))
            entry = tl.load(pointers + site) + part * _PART
            rank = tl.load(pointers + entry + 2, entry < tl.load(pointers + site + 1), other=0)
            for low in range(chunk * _TILE, rank, chunks * _TILE):
                a = _pointer(tl.load(pointers + entry), DTYPE, ALIGNED)
                ranks = low + at
                total = tl.zeros((_TILE, _TILE), tl.float32)
                for first in range(stretch * cut, min(stretch * cut + cut, inputs), BLOCK_K):
                    k = first + tl.arange(0, BLOCK_K)
                    held = (k < inputs)[None, :]
                    values = tl.load(x + row[:, None] * x_stride + k[None, :], of[:, None] & held, other=0.0)
                    weight = tl.load(a + ranks[:, None] * inputs + k[None, :], (ranks < rank)[:, None] & held, other=0.0)
                    if values.dtype != DTYPE:
                        values, weight = values.to(tl.float32), weight.to(tl.float32)
                    total = product(values, tl.trans(weight), total)
                target = inner + ((stretch * parts + part).to(tl.int64) * rows + row[:, None]) * room + ranks[None, :]
                tl.store(target, total, of[:, None])


@triton.jit(do_not_specialize=_OF_A_STEP)
def _expand(
    y, inner, tiles, owners, known, tokens, offsets, sites, site, groups, rows, spread, parts, stretches, y_stride, room,
    DTYPE: tl.constexpr, ALIGNED: tl.constexpr, MADE: tl.constexpr, GROUPED: tl.constexpr, PRECISION: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    tile, part = tl.program_id(0), tl.program_id(2)
    row, mine, who, number, count, group = _tile(tile, tiles, owners, known, tokens, offsets, groups, rows, spread, MADE, GROUPED)
    if GROUPED:
        site = tl.load(sites + group)
    at, n = tl.arange(0, _TILE), tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    hop = parts.to(tl.int64) * rows * room
    for of_adapter in range(tile % spread, count, spread):
        of = mine & (number == of_adapter)
        adapter = tl.max(tl.where(of, who, 0), 0)
        if adapter != 0:
            pointers = adapter.to(tl.pointer_type(tl.int64))
            entry = tl.load(pointers + site) + part * _PART
            there = entry < tl.load(pointers + site + 1)
            rank, columns = tl.load(pointers + entry + 2, there, other=0), tl.load(pointers + entry + 3, there, other=0)
            if tl.program_id(1) * BLOCK_N < columns:
                bt, column = _pointer(tl.load(pointers + entry + 1), DTYPE, ALIGNED), tl.load(pointers + entry + 4)
                total = tl.zeros((_TILE, BLOCK_N), tl.float32)
                for low in range(0, rank, _TILE):
                    between = tl.zeros((_TILE, _TILE), tl.float32)
                    source = inner + (part.to(tl.int64) * rows + row[:, None]) * room + (low + at)[None, :]
                    for stretch in range(stretches):
                        between += tl.load(source + stretch * hop, of[:, None], other=0.0)
                    held = ((low + at) < rank)[:, None] & (n < columns)[None, :]
                    weight = tl.load(bt + (low + at)[:, None] * columns + n[None, :], held, other=0.0)
                    total = tl.dot(between, weight.to(tl.float32), total, input_precision=PRECISION)
                target = y + row[:, None] * y_stride + (column + n)[None, :]
                changed = of[:, None] & (n < columns)[None, :]
                total += tl.load(target, changed, other=0.0).to(tl.float32)
                tl.store(target, rounded(total, y.dtype.element_ty), changed)


def lora(y: Tensor, x: Tensor, use: LoraUse) -> None:
    """As the op says; what lies between A and B meets a B of 16 bits as tf32, whose 11 bits hold that B exactly."""
    table, numbers, rows = use.table, use.sites.numbers, x.shape[0]
    sizes = table.most(use.sites)
    inputs, parts = sizes[INPUTS], sizes[PARTS]
    if not parts or not rows:
        return
    made, grouped = use.tokens is not None, use.offsets is not None
    groups = len(numbers) if grouped else 1
    tiles, spread = (rows // TILE + groups, min(TILE, table.spread)) if made else (table.tiles, 1)
    # Adapters that share a tile are served one after another where tiles are many.
    spread = 1 << min(spread - 1, PROGRAMS // tiles).bit_length() if spread > 1 else 1
    stretches, chunks = triton.cdiv(inputs, CUT), triton.cdiv(table.rank, TILE)
    room = chunks * TILE
    inner = torch.empty((stretches, parts, rows, room), dtype=torch.float32, device=x.device)
    # The ranks of a tile, likewise: each of them reads its rows again.
    chunks = min(chunks, max(1, PROGRAMS // (tiles * spread)), 4)
    absent = table.held  # a pointer that is not followed
    tokens, offsets, sites = (absent if t is None else t for t in (use.tokens, use.offsets, use.sites.held))
    whose = (table.held, table.held[table.tiles * ENTRY :], table.rows, tokens, offsets, sites, numbers[0], groups, rows, spread, parts)
    shared = {"DTYPE": TYPES[table.dtype], "ALIGNED": table.aligned, "MADE": made, "GROUPED": grouped}
    _shrink[tiles * spread, stretches, parts * chunks](
        inner, x, *whose, chunks, inputs, x.stride(0), CUT, room, BLOCK_K=128, num_warps=2, **shared
    )
    block_n = 128
    _expand[tiles * spread, triton.cdiv(sizes[WIDEST], block_n), parts](
        y, inner, *whose, stretches, y.stride(0), room,
        PRECISION="ieee" if table.dtype == torch.float32 else "tf32", BLOCK_N=block_n, num_warps=4, **shared,
    )  # fmt: skip
