"""The block pool: an example for each promise, and a state machine against a counter of references."""

from collections import Counter

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from realm_web.kvcache import BlockPool, OutOfBlocks


def test_a_new_pool_gives_out_its_blocks_in_order():
    pool = BlockPool(5, 16)
    assert pool.allocate(3) == [0, 1, 2]
    assert pool.allocate(0) == []
    assert pool.n_free == 2
    assert [pool.ref_count(block) for block in range(5)] == [1, 1, 1, 0, 0]


def test_freed_blocks_are_given_out_again_in_the_order_in_which_they_were_held():
    pool = BlockPool(5, 16)
    blocks = pool.allocate(5)
    pool.free(blocks[1:4])
    assert pool.allocate(3) == blocks[1:4]


def test_asking_for_more_than_is_free_takes_nothing_and_says_how_many_there_are():
    pool = BlockPool(4, 16)
    pool.allocate(2)
    with pytest.raises(OutOfBlocks, match="3 blocks asked for, 2 of 4 are free"):
        pool.allocate(3)
    assert pool.n_free == 2
    pool.check_integrity()


def test_a_shared_block_is_free_when_its_last_holder_frees_it():
    pool = BlockPool(2, 16)
    blocks = pool.allocate(2)
    pool.share(blocks[:1])
    pool.free(blocks)
    assert (pool.n_free, pool.ref_count(blocks[0])) == (1, 1)
    pool.free(blocks[:1])
    assert pool.n_free == 2


@pytest.mark.parametrize("ids", [[0, 3], [0, 4], [0, -1]])
@pytest.mark.parametrize("operation", ["free", "share"])
def test_a_block_that_is_not_allocated_is_an_error_and_changes_nothing(ids, operation):
    pool = BlockPool(4, 16)
    pool.allocate(2)
    with pytest.raises(ValueError, match=f"block {ids[1]} is not allocated"):
        getattr(pool, operation)(ids)
    assert [pool.ref_count(block) for block in range(4)] == [1, 1, 0, 0]
    pool.check_integrity()


@pytest.mark.parametrize("operation", ["free", "share"])
def test_a_block_named_twice_is_an_error(operation):
    pool = BlockPool(4, 16)
    pool.share(pool.allocate(1))
    with pytest.raises(ValueError, match=r"named twice in \[0, 0\]"):
        getattr(pool, operation)([0, 0])


@pytest.mark.parametrize(("n_tokens", "n_blocks"), [(0, 0), (1, 1), (16, 1), (17, 2), (32, 2)])
def test_blocks_for_rounds_up(n_tokens, n_blocks):
    assert BlockPool(1, 16).blocks_for(n_tokens) == n_blocks


def test_sizes_that_make_no_pool_are_errors():
    for n_blocks, block_size in ((0, 16), (4, 0), (-1, 16)):
        with pytest.raises(ValueError, match="must be at least 1"):
            BlockPool(n_blocks, block_size)
    with pytest.raises(ValueError, match="must not be negative"):
        BlockPool(4, 16).allocate(-1)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda pool: pool._free.append(3), "twice"),
        (lambda pool: pool._free.append(0), "block 0: 1 references, registered False, listed as empty"),
        (lambda pool: pool._free.remove(2), "block 2: 0 references, registered False, listed as neither"),
        (lambda pool: pool._free.append(9), "block 9 in the free list is not of this pool"),
        (lambda pool: pool._ref_counts.__setitem__(2, -1), "block 2 has -1 references"),
    ],
)
def test_check_integrity_names_the_block_that_is_wrong(spoil, message):
    pool = BlockPool(4, 16)
    pool.allocate(2)
    pool.check_integrity()
    spoil(pool)
    with pytest.raises(AssertionError, match=message):
        pool.check_integrity()


class Holders(RuleBasedStateMachine):
    """Any order of allocate, share and free, against a plain count of holders."""

    def __init__(self):
        super().__init__()
        self.pool = BlockPool(8, 4)
        self.held: list[list[int]] = []

    @rule(n=st.integers(0, 9))
    def allocate(self, n):
        if n > self.pool.n_free:
            with pytest.raises(OutOfBlocks):
                self.pool.allocate(n)
            return
        taken = self.pool.allocate(n)
        assert len(set(taken)) == n
        assert not set(taken) & {block for blocks in self.held for block in blocks}
        self.held.append(taken)

    @rule(data=st.data())
    def share(self, data):
        if self.held:
            blocks = data.draw(st.sampled_from(self.held))
            prefix = blocks[: data.draw(st.integers(0, len(blocks)))]
            self.pool.share(prefix)
            self.held.append(prefix)

    @rule(data=st.data())
    def free(self, data):
        if self.held:
            self.pool.free(self.held.pop(data.draw(st.integers(0, len(self.held) - 1))))

    @invariant()
    def counts_are_those_of_the_holders(self):
        self.pool.check_integrity()
        counts = Counter(block for blocks in self.held for block in blocks)
        assert [self.pool.ref_count(block) for block in range(8)] == [counts[block] for block in range(8)]
        assert self.pool.n_free == 8 - len(counts)


TestHolders = Holders.TestCase
TestHolders.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
