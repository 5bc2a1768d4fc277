"""The paged KV cache: which blocks are free, how many holders the others have, and the memory behind them.

A block is room for the keys and values of `block_size` consecutive tokens of a sequence, in every layer. The
pool deals in block numbers only: it knows neither the device memory behind them nor the requests that hold
them.
"""

from __future__ import annotations

from collections.abc import Sequence

from realm_web.ops import Pages
from realm_web.runtime.device import Device
from realm_web.tensor import Tensor


class OutOfBlocks(Exception):
    """More blocks were asked for than are free; nothing was allocated. The scheduler asks before."""


class BlockPool:
    """Block numbers 0 to n_blocks-1 with reference counts; the block freed last is given out first."""

    def __init__(self, n_blocks: int, block_size: int):
        if n_blocks < 1 or block_size < 1:
            raise ValueError(f"a pool of {n_blocks} blocks of {block_size} tokens: both must be at least 1")
        self.n_blocks = n_blocks
        self.block_size = block_size
        self._free = list(range(n_blocks - 1, -1, -1))  # a stack: block 0 is on top
        self._ref_counts = [0] * n_blocks

    @property
    def n_free(self) -> int:
        return len(self._free)

    def blocks_for(self, n_tokens: int) -> int:
        """How many blocks hold n_tokens."""
        return -(-n_tokens // self.block_size)

    def allocate(self, n: int) -> list[int]:
        """Take n free blocks, each with one reference; OutOfBlocks, and none taken, if fewer are free."""
        if n < 0:
            raise ValueError(f"{n} blocks asked for: must not be negative")
        if n > len(self._free):
            raise OutOfBlocks(f"{n} blocks asked for, {len(self._free)} of {self.n_blocks} are free")
        taken = [self._free.pop() for _ in range(n)]
        for block in taken:
            self._ref_counts[block] = 1
        return taken

    def share(self, ids: Sequence[int]) -> None:
        """One more holder for each of these allocated blocks; each holder frees them once."""
        self._check_allocated(ids)
        for block in ids:
            self._ref_counts[block] += 1

    def free(self, ids: Sequence[int]) -> None:
        """Give up one reference to each block; a block without holders can be allocated again.

        Raises ValueError, and frees none, if a block is not allocated or is named twice.
        """
        self._check_allocated(ids)
        for block in reversed(ids):
            self._ref_counts[block] -= 1
            if self._ref_counts[block] == 0:
                self._free.append(block)

    def ref_count(self, block: int) -> int:
        """How many holders a block has; 0 is free."""
        return self._ref_counts[block]

    def check_integrity(self) -> None:
        """AssertionError naming the block if the free list and the reference counts disagree."""
        free = set(self._free)
        assert len(free) == len(self._free), f"a block is in the free list twice: {sorted(self._free)}"
        for block in free:
            assert 0 <= block < self.n_blocks, f"block {block} in the free list is not of this pool"
        for block, count in enumerate(self._ref_counts):
            assert count >= 0, f"block {block} has {count} references"
            listed = "in" if block in free else "not in"
            assert (count == 0) == (block in free), (
                f"block {block}: {count} references, {listed} the free list"
            )

    def _check_allocated(self, ids: Sequence[int]) -> None:
        if len(set(ids)) != len(ids):
            raise ValueError(f"a block is named twice in {list(ids)}")
        for block in ids:
            if not 0 <= block < self.n_blocks or self._ref_counts[block] == 0:
                raise ValueError(f"block {block} is not allocated: freed twice, or not of this pool")


def alloc_pages(
    device: Device,
    n_kv_heads: int,
    head_dim: int,
    *,
    n_blocks: int,
    block_size: int,
    dtype: str,
    ring: int,
    max_seqs: int,
) -> Pages:
    """Memory for one layer: `n_blocks` blocks for all, or with `ring` so many per slot; f16 or f32."""
    shape = (ring * max_seqs or n_blocks, n_kv_heads, block_size, head_dim)
    k, v = (Tensor.alloc(device, shape, dtype, "KV cache") for _ in range(2))
    return Pages(k, v, ring)
