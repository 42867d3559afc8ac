"""Ragged paged attention for processors, in Numba: reads the KV blocks where they lie, so that nothing is copied or gathered.

A piece of work is a few neighbouring heads of one row of the batch. It writes the row's new K and V into their slots. Then, for
a few queries at a time, it walks over the row's blocks twice: once for the scores of all columns, and once to add up the
values. With a context of a thousand the scores of a piece fit into the second-level cache, so there is no need for an online
softmax. The next head's part of a block is asked for while this one's is computed: reading the cache is what takes the time.

All arithmetic is float32, whatever the activations and the cache are stored in. Its order depends on the row alone, so that
neither the neighbours in the batch nor the number of threads change a bit of the result.
"""

from functools import cache
from typing import Any

import numpy as np
import torch
from numba import carray, cfunc, types

from kernels import cpu
from kernels.cpu import LOG2_E, STORED, announce, bits, compiled, draw, exp2, float_of, load, pointer, prefetch, store

LINE = 64  # bytes that come from memory together
MOST_HEADS = 16  # of a piece of work: neighbours in memory, so that the processor reads ahead
PIECES_A_THREAD = 4  # at least, where there are so many heads: for an even share
TILE = 4  # queries that share a walk over the blocks
DONE = 21 * 8  # bytes from the first argument to the count of pieces that are done


def attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, batch: Any
) -> torch.Tensor:
    """As `paged_attention`, for float32 or bfloat16 tensors on a CPU. q, k, v may be strided over tokens, not within one."""
    out = torch.empty(q.shape, dtype=q.dtype)
    places = (q.data_ptr(), k.data_ptr(), v.data_ptr(), out.data_ptr())
    out[int(batch.begins[-1]) :] = 0
    pieces, arguments = describe(*places, q.stride(0), k_cache, v_cache, batch)
    cpu.run(kernel_for(q.dtype, k_cache.dtype), pieces, *arguments[1:])
    return out


def describe(
    q: int, k: int, v: int, out: int, stride: int, k_cache: torch.Tensor, v_cache: torch.Tensor, batch: Any
) -> tuple[int, list[int]]:
    """Into how many pieces the work is cut, and the kernel's arguments. The last of them counts the pieces that are done."""
    rows, width = batch.tables.shape
    blocks, heads, block_size, head_size = k_cache.shape
    group = max(1, min(MOST_HEADS, rows * heads // (PIECES_A_THREAD * torch.get_num_threads())))
    tensors = (k_cache, v_cache, batch.begins, batch.starts, batch.spans, batch.tables, batch.slots)
    sizes = (len(batch.slots), stride, rows, width, blocks, block_size, heads, head_size, group)
    arguments = [0, q, k, v, out, *(tensor.data_ptr() for tensor in tensors), *sizes, 0]
    return rows * -(-heads // group), arguments


def kernel_for(dtype: torch.dtype, cached_as: torch.dtype) -> Any:
    """The cfunc for queries and a cache of these dtypes."""
    return _kernel(STORED[dtype], STORED[cached_as])


@cache
def _kernel(stored: Any, cached: Any) -> Any:
    """Compiled for these dtypes, and kept on disk from one start to the next."""

    @cfunc(cpu.SIGNATURE, cache=True)
    def kernel(arguments):
        a = carray(arguments, 22)
        tokens, stride, rows, width, blocks = a[12], a[13], a[14], a[15], a[16]
        block_size, heads, head_size, group = a[17], a[18], a[19], a[20]
        q = carray(pointer(a[1], stored), (tokens, stride))
        k = carray(pointer(a[2], stored), (tokens, stride))
        v = carray(pointer(a[3], stored), (tokens, stride))
        out = carray(pointer(a[4], stored), (tokens, heads * head_size))
        k_cache = carray(pointer(a[5], cached), (blocks, heads, block_size, head_size))
        v_cache = carray(pointer(a[6], cached), (blocks, heads, block_size, head_size))
        begins = carray(pointer(a[7], types.int32), rows + 1)
        starts = carray(pointer(a[8], types.int32), rows)
        spans = carray(pointer(a[9], types.int32), rows)
        tables = carray(pointer(a[10], types.int32), (rows, width))
        slots = carray(pointer(a[11], types.int64), tokens)
        queries = np.empty((group * TILE, head_size), np.float32)
        sums = np.empty((group * TILE, head_size), np.float32)
        scores = np.empty((group * TILE, width * block_size), np.float32)
        groups = -(-heads // group)
        while True:
            piece = draw(arguments)
            if piece >= rows * groups:
                break
            row, g = divmod(piece, groups)
            low, high = g * group, min(heads, (g + 1) * group)
            begin, end, start = begins[row], begins[row + 1], starts[row]
            write(k, k_cache, slots, begin, end, low, high)
            write(v, v_cache, slots, begin, end, low, high)
            for first in range(begin, end, TILE):
                count = min(TILE, end - first)
                column = start + first - begin
                read = max(column + count, spans[row])
                fetch(q, first, count, low, high, queries)
                attend(queries, sums, scores, k_cache, v_cache, tables, row, low, high, count, column, read)
                hand_out(sums, out, first, count, low, high)
            announce(pointer(a.ctypes.data + DONE, types.int64))

    return kernel


@compiled
def attend(queries, sums, scores, k_cache, v_cache, tables, row, low, high, count, column, read):
    """`count` queries, the first of them at `column`, over the columns [0, read) of heads [low, high), to `sums`."""
    block_size, heads = k_cache.shape[2], high - low
    last = -(-read // block_size) - 1
    for block in range(last + 1):
        width = min(block_size, read - block * block_size)
        for h in range(heads):
            ahead, head = tables[row, min(block + (h + 1) // heads, last)], low + (h + 1) % heads
            for i in range(count):
                score(
                    queries, h * count + i, k_cache, tables[row, block], low + h, width, scores, block * block_size, ahead, head
                )
    for s in range(heads * count):
        weigh(scores, s, column + s % count + 1, read)
        sums[s] = 0
    for block in range(last + 1):
        width = min(block_size, read - block * block_size)
        for h in range(heads):
            ahead, head = tables[row, min(block + (h + 1) // heads, last)], low + (h + 1) % heads
            for i in range(count):
                add(sums, h * count + i, scores, block * block_size, v_cache, tables[row, block], low + h, width, ahead, head)


@compiled
def score(queries, s, k_cache, block, head, width, scores, first, next_block, next_head):
    """Query `s` times the first `width` keys of a block, to scores[s, first] onwards."""
    for c in range(width):
        ask(k_cache, next_block, next_head, c)
        total = np.float32(0)
        for d in range(queries.shape[1]):
            total += queries[s, d] * load(k_cache[block, head, c, d])
        scores[s, first + c] = total


@compiled
def weigh(scores, s, seen, read):
    """The softmax of scores[s, :seen]; the columns from there to `read`, which the query may not see, get weight 0."""
    top = ordered(bits(scores[s, 0]))
    for c in range(seen):  # of integers the compiler makes vector code
        top = max(top, ordered(bits(scores[s, c])))
    highest = float_of(ordered(top))
    for c in range(seen):
        scores[s, c] = exp2(scores[s, c] - highest)
    total = np.float32(0)
    for c in range(seen):
        total += scores[s, c]
    for c in range(seen):
        scores[s, c] /= total
    for c in range(seen, read):
        scores[s, c] = 0


@compiled
def add(sums, s, weights, first, v_cache, block, head, width, next_block, next_head):
    """The values of a block, weighted, to sums[s]; four columns at a time, so that the sums are touched less often."""
    c = 0
    while c + 4 <= width:
        for ahead in range(c, c + 4):
            ask(v_cache, next_block, next_head, ahead)
        w0, w1 = weights[s, first + c], weights[s, first + c + 1]
        w2, w3 = weights[s, first + c + 2], weights[s, first + c + 3]
        for d in range(sums.shape[1]):
            sums[s, d] += (w0 * load(v_cache[block, head, c, d]) + w1 * load(v_cache[block, head, c + 1, d])) + (
                w2 * load(v_cache[block, head, c + 2, d]) + w3 * load(v_cache[block, head, c + 3, d])
            )
        c += 4
    while c < width:
        for d in range(sums.shape[1]):
            sums[s, d] += weights[s, first + c] * load(v_cache[block, head, c, d])
        c += 1


@compiled
def ask(array, block, head, column):
    """Ask for a column of a block, which will be read soon."""
    _, heads, block_size, head_size = array.shape
    first = array.ctypes.data + ((np.int64(block) * heads + head) * block_size + column) * head_size * array.itemsize
    for line in range(0, head_size * array.itemsize, LINE):
        prefetch(first + line)


@compiled
def write(new, array, slots, begin, end, low, high):
    """The new keys, or values, of tokens [begin, end) into their slots."""
    _, _, block_size, head_size = array.shape
    for token in range(begin, end):
        block, offset = divmod(slots[token], block_size)
        for head in range(low, high):
            for d in range(head_size):
                array[block, head, offset, d] = store(load(new[token, head * head_size + d]), array)


@compiled
def fetch(q, first, count, low, high, queries):
    """Queries as float32, and so that scores are in units of log 2, for exp2."""
    head_size = queries.shape[1]
    scale = LOG2_E / np.float32(np.sqrt(head_size))
    for head in range(low, high):
        for i in range(count):
            for d in range(head_size):
                queries[(head - low) * count + i, d] = load(q[first + i, head * head_size + d]) * scale


@compiled
def hand_out(sums, out, first, count, low, high):
    head_size = sums.shape[1]
    for head in range(low, high):
        for i in range(count):
            for d in range(head_size):
                out[first + i, head * head_size + d] = store(sums[(head - low) * count + i, d], out)


@compiled
def ordered(pattern):
    """A float's bits as an integer that is ordered as floats are, and back."""
    return pattern ^ ((pattern >> np.int32(31)) & np.int32(0x7FFFFFFF))
