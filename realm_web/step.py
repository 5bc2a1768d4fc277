"""The one buffer that changes from step to step: tokens, positions, block tables, sampling parameters.

Everything else in a recorded program is constant. All words are u32 (floats by their bits). Layout:

    header (16) | sequence records (max_seqs x 16)
    | tokens | positions | sequence of each row | tiles | targets (max_rows each)
    | block tables (max_seqs x max_blocks)

A *row* is one token of this step; a *tile* is up to `qt` consecutive rows of one sequence (first row,
count << 16). The *target* of a row is the token whose log-probability is asked for, NONE where none is.
Kernels see the layout as the constant `st`.
"""

from __future__ import annotations

import struct
from array import array
from collections.abc import Sequence
from dataclasses import dataclass

NONE = 0xFFFFFFFF


@dataclass(frozen=True, order=True)
class StepLayout:
    max_rows: int
    max_seqs: int
    max_blocks: int  # per sequence

    # header words
    N_ROWS = 0
    N_SEQS = 1
    N_TILES = 2
    ADVANCE = 3
    # words of a sequence record
    SEQ_WORDS = 16
    SLOT = 0
    KV_LEN = 1
    LOGITS_ROW = 2
    DRAW_POSITION = 3
    SEED = 4
    TEMPERATURE = 5
    TOP_K = 6
    TOP_P = 7
    MIN_P = 8
    REPETITION = 9
    PRESENCE = 10
    FREQUENCY = 11
    MASK_UNTIL = 12  # the token mask of the slot applies to draws at positions below this
    TOP_LOGPROBS = 13  # 0: no log-probabilities; n + 1: of the token drawn and the n likeliest
    ADAPTER = 14
    POOL = 15  # of the sequence's final hidden states: NO_POOL, MEAN, LAST or CLS
    # values of POOL
    NO_POOL, MEAN, LAST, CLS = range(4)

    @property
    def seqs(self) -> int:
        return 16

    @property
    def tokens(self) -> int:
        return self.seqs + self.SEQ_WORDS * self.max_seqs

    @property
    def positions(self) -> int:
        return self.tokens + self.max_rows

    @property
    def row_seqs(self) -> int:
        return self.positions + self.max_rows

    @property
    def tiles(self) -> int:
        return self.row_seqs + self.max_rows

    @property
    def targets(self) -> int:
        return self.tiles + self.max_rows

    @property
    def tables(self) -> int:
        return self.targets + self.max_rows

    @property
    def n_words(self) -> int:
        return self.tables + self.max_seqs * self.max_blocks

    def pack(
        self,
        *,
        tokens: Sequence[int],
        positions: Sequence[int],
        row_seqs: Sequence[int],
        records: Sequence[bytes],
        tiles: Sequence[int],
        advance: bool,
        targets: Sequence[int] = (),
        tables: Sequence[Sequence[int]] = (),
    ) -> bytes:
        """The words from 0 to the end of the last block table given, as bytes."""
        words = array("I", bytes(4 * (self.tables + len(tables) * self.max_blocks)))
        words[0:4] = array("I", [len(tokens), len(records), len(tiles), advance])
        words[self.seqs : self.seqs + self.SEQ_WORDS * len(records)] = array("I", b"".join(records))
        for start, values in (
            (self.tokens, tokens),
            (self.positions, positions),
            (self.row_seqs, row_seqs),
            (self.tiles, tiles),
        ):
            words[start : start + len(values)] = array("I", values)
        rest = b"\xff" * (4 * (self.max_rows - len(targets)))  # NONE
        words[self.targets : self.tables] = array("I", targets) + array("I", rest)
        for i, blocks in enumerate(tables):
            start = self.tables + i * self.max_blocks
            words[start : start + len(blocks)] = array("I", blocks)
        return words.tobytes()


def sequence_record(
    *,
    slot: int,
    kv_len: int,
    logits_row: int,
    draw_position: int,
    seed: int,
    params: bytes,
    mask_until: int = 0,
    top_logprobs: int = 0,
    adapter: int = 0,
    pool: int = StepLayout.NO_POOL,
) -> bytes:
    """One 16-word record; `params` comes from `sampling_words`."""
    first = struct.pack("<5I", slot, kv_len, logits_row, draw_position, seed)
    return first + params + struct.pack("<4I", mask_until, top_logprobs, adapter, pool)


def sampling_words(
    *,
    temperature: float,
    top_k: int,
    top_p: float,
    min_p: float,
    repetition: float,
    presence: float,
    frequency: float,
) -> bytes:
    """The 7 words of a record that do not change while a request runs."""
    return struct.pack("<fI5f", temperature, top_k, top_p, min_p, repetition, presence, frequency)
