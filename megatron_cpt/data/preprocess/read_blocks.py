"""Input files as a sequence of blocks.

The places where files are cut follow from the files alone, not from the number of workers, nodes or restarts. So a run
can stop after any block and resume with the next one, and each node can take a range of blocks.
"""

from __future__ import annotations

from collections.abc import Iterator

from megatron_cpt.data.preprocess.inputs import Block, BlockOptions, Cursor, InputFiles, Shard
from megatron_cpt.data.preprocess.jsonl import cut_stream, open_packed


def read_blocks(
    files: InputFiles, options: BlockOptions, shard: Shard | None = None, start: Cursor | None = None
) -> Iterator[Block]:
    """Yield the blocks of a shard, from a cursor on.

    A block belongs to the shard in which it begins. Packed files cannot be entered in the middle, so all their blocks
    belong to the shard in which the file begins.
    """
    first, last = (shard or Shard()).interval(files.total_bytes)
    start = start or Cursor()
    for number, path in enumerate(files.paths):
        base, file_end = files.starts[number : number + 2]
        if number < start.file or file_end <= first or base >= last:
            continue
        begin = start.position if number == start.file else 0
        if path.endswith(".parquet"):
            from megatron_cpt.data.preprocess.parquet import parquet_blocks

            yield from parquet_blocks(number, path, (base, file_end), (first, last), options, begin)
        elif path.endswith((".gz", ".zst")):
            if first <= base < last:
                yield from _packed_blocks(number, path, base, options, begin)
        else:
            yield from _plain_blocks(number, path, (base, file_end), (first, last), options.block_bytes, begin)


def _plain_blocks(
    number: int, path: str, extent: tuple[int, int], interval: tuple[int, int], block_bytes: int, begin: int
) -> Iterator[Block]:
    """Cut at multiples of `block_bytes`; the lines of a block are those that begin in it (`read_range`)."""
    base, file_end = extent
    low = max(begin, interval[0] - base, 0)
    for position in range(-(-low // block_bytes) * block_bytes, min(file_end, interval[1]) - base, block_bytes):
        end = min(position + block_bytes, file_end - base)
        yield Block(number, path, position, end, base + end)


def _packed_blocks(number: int, path: str, base: int, options: BlockOptions, begin: int) -> Iterator[Block]:
    with open_packed(path) as file:
        for cut in cut_stream(file, options.block_bytes, options.max_line_bytes):
            if cut.position >= begin:
                done = base + file.tell()
                yield Block(number, path, cut.position, cut.end, done, lines=cut.lines, damage=cut.damage)


def lines_before(block: Block, options: BlockOptions) -> int:
    """Count the line ends of a file before a block; needed only to number a bad line of a shard's first file."""
    if block.path.endswith(".parquet"):
        return block.position
    count, left = 0, block.position
    with open(block.path, "rb") as file:
        while left > 0 and (piece := file.read(min(left, options.block_bytes))):
            count += piece.count(b"\n")
            left -= len(piece)
    return count
