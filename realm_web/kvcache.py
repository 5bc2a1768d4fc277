"""The paged KV cache: which blocks are free, held or worth keeping, and the memory behind them.

A block is room for the keys and values of `block_size` consecutive tokens of a sequence, in every layer. The
pool deals in block numbers only: it knows neither the device memory behind them nor the requests that hold
them.

A full block may be registered under the digest of all tokens up to its end. As long as nobody needs its room,
it can be found again by that digest, also after its last holder has gone: this is the prefix cache.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Sequence
from math import prod

from realm_web.models.config import kv_head_bytes
from realm_web.ops import Pages
from realm_web.runtime.device import Device
from realm_web.tensor import Tensor

DIGEST_BYTES = 16
BLOCK_SIZE = 32  # tokens


def root_digest(adapter: int, salt: bytes) -> bytes:
    """The digest before the first block. Other adapters compute other keys; other salts share nothing."""
    return hashlib.blake2b(adapter.to_bytes(4, "little") + salt, digest_size=DIGEST_BYTES).digest()


def block_digest(parent: bytes, token_ids: Sequence[int]) -> bytes:
    """The digest of a full block after the block of digest `parent`: BLAKE2b, 16 bytes.

    A cryptographic hash, as a block that is found by its digest is not compared with the tokens: whoever
    sends prompts must not be able to make one that is taken for another's (that takes 2**128 attempts).
    """
    return hashlib.blake2b(parent + array("I", token_ids).tobytes(), digest_size=DIGEST_BYTES).digest()


class OutOfBlocks(Exception):
    """More blocks were asked for than are free; nothing was allocated. The scheduler asks before."""


class BlockPool:
    """Block numbers 0 to n_blocks-1 with reference counts.

    A block without holders is either empty or, if it was registered, cached. Empty ones are given out first,
    the one freed last before the others; then the cached one that has been without holders for longest.
    """

    def __init__(self, n_blocks: int, block_size: int):
        if n_blocks < 1 or block_size < 1:
            raise ValueError(f"a pool of {n_blocks} blocks of {block_size} tokens: both must be at least 1")
        self.n_blocks = n_blocks
        self.block_size = block_size
        self._free = list(range(n_blocks - 1, -1, -1))  # a stack: block 0 is on top
        self._ref_counts = [0] * n_blocks
        self._digests: list[bytes | None] = [None] * n_blocks  # of registered blocks
        self._by_digest: dict[bytes, int] = {}
        self._cached: OrderedDict[int, None] = OrderedDict()  # registered, no holder; the oldest first

    @property
    def n_free(self) -> int:
        """How many blocks `allocate` can give: the empty ones and the cached ones."""
        return len(self._free) + len(self._cached)

    @property
    def n_cached(self) -> int:
        """How many blocks have no holder and are kept for whoever comes with the same tokens."""
        return len(self._cached)

    def blocks_for(self, n_tokens: int) -> int:
        """How many blocks hold n_tokens."""
        return -(-n_tokens // self.block_size)

    def allocate(self, n: int) -> list[int]:
        """Take n free blocks, each with one reference; OutOfBlocks, and none taken, if fewer are free."""
        if n < 0:
            raise ValueError(f"{n} blocks asked for: must not be negative")
        if n > self.n_free:
            raise OutOfBlocks(f"{n} blocks asked for, {self.n_free} of {self.n_blocks} are free")
        taken = [self._free.pop() if self._free else self._evict() for _ in range(n)]
        for block in taken:
            self._ref_counts[block] = 1
        return taken

    def share(self, ids: Sequence[int]) -> None:
        """One more holder for each of these allocated or cached blocks; each holder frees them once."""
        self._check(ids, cached=True)
        for block in ids:
            if self._ref_counts[block] == 0:
                del self._cached[block]
            self._ref_counts[block] += 1

    def free(self, ids: Sequence[int]) -> None:
        """Give up one reference to each block; a block without holders can be allocated again.

        The blocks of a sequence are given in its order: the last one is then evicted first, as the ones
        before it are of use without it. Raises ValueError, and frees none, if a block is not allocated or is
        named twice.
        """
        self._check(ids)
        for block in reversed(ids):
            self._ref_counts[block] -= 1
            if self._ref_counts[block] == 0:
                if self._digests[block] is None:
                    self._free.append(block)
                else:
                    self._cached[block] = None

    def match(self, digests: Sequence[bytes]) -> list[int]:
        """The blocks registered under the first digests, up to the first that there is no block for."""
        found = []
        for digest in digests:
            block = self._by_digest.get(digest)
            if block is None:
                break
            found.append(block)
        return found

    def register(self, block: int, digest: bytes) -> bool:
        """Let `match` find an allocated block, which nobody will write to any more.

        False, and nothing is changed, if a block with the same content is registered already: one is enough.
        """
        self._check((block,))
        if self._digests[block] is not None:
            raise ValueError(f"block {block} is registered already")
        if digest in self._by_digest:
            return False
        self._by_digest[digest] = block
        self._digests[block] = digest
        return True

    def clear_cache(self) -> None:
        """Forget what every block holds. Blocks with holders stay theirs, but nobody else finds them."""
        self._free += reversed(self._cached)
        self._cached.clear()
        self._by_digest.clear()
        self._digests = [None] * self.n_blocks

    def ref_count(self, block: int) -> int:
        """How many holders a block has; 0 is free."""
        return self._ref_counts[block]

    def digest(self, block: int) -> bytes | None:
        """What a block is registered under."""
        return self._digests[block]

    def check_integrity(self) -> None:
        """AssertionError naming the block if the lists, the digests and the reference counts disagree."""
        free = set(self._free)
        assert len(free) == len(self._free), f"a block is in the free list twice: {sorted(self._free)}"
        for block in free:
            assert 0 <= block < self.n_blocks, f"block {block} in the free list is not of this pool"
        for block, count in enumerate(self._ref_counts):
            assert count >= 0, f"block {block} has {count} references"
            registered = self._digests[block] is not None
            where = {"empty": block in free, "cached": block in self._cached}
            should = {"empty": count == 0 and not registered, "cached": count == 0 and registered}
            assert where == should, (
                f"block {block}: {count} references, registered {registered}, listed as "
                f"{' and '.join(name for name, listed in where.items() if listed) or 'neither'}"
            )
        registered = {digest: block for block, digest in enumerate(self._digests) if digest is not None}
        assert registered == self._by_digest, (
            f"blocks {sorted(registered.values())} have digests, those of blocks "
            f"{sorted(self._by_digest.values())} can be found"
        )

    def _evict(self) -> int:
        block, _ = self._cached.popitem(last=False)
        del self._by_digest[self._digests[block]]
        self._digests[block] = None
        return block

    def _check(self, ids: Sequence[int], *, cached: bool = False) -> None:
        if len(set(ids)) != len(ids):
            raise ValueError(f"a block is named twice in {list(ids)}")
        for block in ids:
            if not 0 <= block < self.n_blocks or not (
                self._ref_counts[block] or (cached and block in self._cached)
            ):
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
    """Memory for one layer: `n_blocks` blocks for all, or with `ring` so many per slot; f16, f32 or q8_0."""
    shape = (ring * max_seqs or n_blocks, n_kv_heads, block_size, head_dim)
    nbytes = prod(shape[:3]) * kv_head_bytes(dtype, head_dim)
    k, v = (Tensor(device.alloc(nbytes, "KV cache"), 0, nbytes, shape, dtype) for _ in range(2))
    return Pages(k, v, ring)
