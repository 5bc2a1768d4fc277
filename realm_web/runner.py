"""Runs batches: one write of the step buffer, one submission of a recorded program, sampled ids back.

A program is recorded once for each bucket of rows, sequences and kind of sampling, and replayed from then on.
While the same requests decode token after token, not even the step buffer is written: the device advances it.
Knows batches and the device; knows no text and no event loop beyond awaiting the device.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from realm_web import ops
from realm_web.errors import DeviceError
from realm_web.kvcache import BlockPool, alloc_pages
from realm_web.models.config import ModelConfig
from realm_web.models.rope import RopeTable
from realm_web.models.shortconv import States
from realm_web.models.transformer import Transformer
from realm_web.ops import MATVEC_ROWS, Pages, Recorder, Rope, State, query_tile
from realm_web.runtime.device import Device, Program, Readback
from realm_web.sampler import SamplingParams
from realm_web.scheduler import Batch, Request, SeqSlice
from realm_web.step import NONE, StepLayout, sampling_words, sequence_record
from realm_web.tensor import Tensor

BLOCK_SIZE = 32
ROW_BUCKETS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
PREFILL_BUCKETS = (32, 128, 512)  # compiled when the model is opened, with the bucket of 1
SPLIT_AT = ((256, 1), (1024, 4), (1 << 30, 16))  # attention parts up to so many tokens of context


@dataclass(frozen=True)
class Bucket:
    """What a program is recorded for."""

    n_rows: int
    n_seqs: int
    splits: int
    draw: bool  # some sequence is not greedy
    adjust: bool  # some sequence has penalties or a logit bias


class Runner:
    """A model on a device with its KV cache, for batches of at most max_rows rows and max_seqs sequences."""

    def __init__(
        self,
        device: Device,
        model: Transformer,
        *,
        context: int,
        max_seqs: int,
        max_rows: int,
        kv_type: str = "f16",
        ropes: Sequence[RopeTable],
    ):
        self.device, self.model = device, model
        self.max_rows, self.kv_type = max_rows, kv_type
        self._prefill_buckets = [b for b in PREFILL_BUCKETS if b < max_rows] + [_bucket_for(max_rows)]
        n_blocks = -(-context // BLOCK_SIZE)
        self.pool = BlockPool(n_blocks, BLOCK_SIZE)
        self.layout = StepLayout(_bucket_for(max_rows), max_seqs, n_blocks)
        self._states = self._alloc_states()
        self.memory = self._memory()
        self._step = device.alloc(4 * self.layout.n_words, "step")
        self._slots = device.alloc(4 * max_seqs, "slots")
        self._out = device.alloc(4 * _bucket_for(max_seqs), "sampled ids")
        self._ropes = [self._rope(table) for table in ropes]
        self._arena: dict[str, Tensor] = {}
        # logit bias and token counts, (max_seqs, n_vocab), from the first request that needs them
        self._adjustments: tuple[Tensor, Tensor] | None = None
        self._adjusted_slots: set[int] = set()  # whose rows there are not zero
        self._programs: dict[Bucket, Program] = {}
        self._last: Batch | None = None  # what the step buffer holds, before the device advanced it
        self.n_writes = 0  # of the step buffer

    @property
    def config(self) -> ModelConfig:
        return self.model.config

    async def prepare(self, on_progress: Callable[[int, int], None] | None = None) -> None:
        """Record and compile the programs that one conversation needs."""
        splits = {1} if self.device.info.is_cpu else {splits for _, splits in SPLIT_AT}
        shapes = {(1, n) for n in splits} | {(n_rows, 1) for n_rows in self._prefill_buckets}
        for n_rows, n_splits in sorted(shapes):
            self._program(Bucket(n_rows, 1, n_splits, draw=False, adjust=False))
        self._program(Bucket(1, 1, 1, draw=True, adjust=False))
        await self.device.compile(on_progress)

    def has(self, bucket: Bucket) -> bool:
        return bucket in self._programs

    async def compile(self, bucket: Bucket) -> None:
        """Record and compile the program of a bucket that is used for the first time."""
        self._program(bucket)
        await self.device.compile()

    def run(self, batch: Batch, bucket: Bucket, requests: Sequence[Request]) -> Readback:
        """Submit the batch of these requests, one per sequence; the readback is a u32 id for each."""
        if bucket.adjust:
            self._write_adjustments(batch, requests)
        self._write_step(batch, requests)
        return self.device.submit(self._programs[bucket])

    async def read_state(self, slot: int) -> bytes:
        """What the recurrent layers keep of the sequence in this slot, after all steps submitted so far.

        With the sequence's pages it is all that a continuation needs. Empty for models without such layers.
        """
        return await self._states.read(slot) if self._states else b""

    def write_state(self, slot: int, data: bytes) -> None:
        """Put back what `read_state` gave, in any slot, ahead of the steps submitted from now on."""
        if self._states:
            self._states.write(slot, data)
        elif data:
            raise ValueError(f"a state of {len(data)} bytes for a model that has none")

    def forget(self) -> None:
        """The step buffer may hold anything: write it whole at the next step."""
        self._last = None

    def bucket(self, batch: Batch, requests: Sequence[Request]) -> Bucket:
        """What program this batch needs."""
        longest = max(seq.kv_len for seq in batch.seqs)
        n_rows = _bucket_for(batch.n_rows)
        if n_rows > MATVEC_ROWS and not batch.is_decode:  # the buckets that are compiled already
            n_rows = next(b for b in self._prefill_buckets if b >= n_rows)
        splits = 1
        if n_rows <= MATVEC_ROWS and not self.device.info.is_cpu:
            splits = next(splits for length, splits in SPLIT_AT if longest <= length)
        return Bucket(
            n_rows=n_rows,
            n_seqs=_bucket_for(len(batch.seqs)),
            splits=splits,
            draw=not all(request.params.greedy for request in requests),
            adjust=any(_adjusts(request.params) for request in requests),
        )

    def _program(self, bucket: Bucket) -> Program:
        """Record the whole pass for a bucket. New kernels are still to be compiled."""
        device, layout = self.device, self.layout
        program = device.program(str(bucket))
        recorder = Recorder(
            device, program, layout, device.view(self._step), device.view(self._slots),
            bucket.n_rows, bucket.n_seqs, self._qt(bucket.n_rows), bucket.splits, self._arena,
        )  # fmt: skip
        logits = self.model.record(recorder, self.memory, self._ropes)
        bias, counts = self._adjustment_tables() if bucket.adjust else (None, None)
        ops.sample(recorder, logits, device.view(self._out), draw=bucket.draw, bias=bias, counts=counts)
        program.readback = device.view(self._out, 0, 4 * bucket.n_seqs)
        self._programs[bucket] = program
        return program

    def _qt(self, n_rows: int) -> int:
        """Query rows per attention tile: one for the matrix-vector kernel, else what a workgroup keeps."""
        config = self.config
        if n_rows <= MATVEC_ROWS:
            return 1
        return query_tile(self.device, config.heads_per_kv, config.head_dim)

    def _alloc_states(self) -> States | None:
        config = self.config
        n_layers = sum(not layer.n_kv_heads for layer in config.layers)
        if not n_layers:
            return None
        max_seqs, length = self.layout.max_seqs, config.l_cache - 1
        return States(self.device, max_seqs=max_seqs, n_layers=n_layers, length=length, dim=config.dim)

    def _memory(self) -> list[Pages | State]:
        """What each layer keeps of the sequences."""
        memory: list[Pages | State] = []
        n_states = 0
        for layer in self.config.layers:
            if layer.n_kv_heads:
                memory.append(self._pages(layer.window, layer.n_kv_heads))
            else:
                memory.append(self._states.layer(n_states))
                n_states += 1
        return memory

    def _pages(self, window: int, n_kv_heads: int) -> Pages:
        """Of a layer that sees everything (window 0) in the shared pool; of another, its window."""
        config, n_blocks = self.config, self.pool.n_blocks
        ring = -(-(window + self.max_rows) // BLOCK_SIZE) + 1
        if not window or ring * self.layout.max_seqs >= n_blocks:
            ring = 0
        return alloc_pages(
            self.device, n_kv_heads, config.head_dim, n_blocks=n_blocks, block_size=BLOCK_SIZE,
            dtype=self.kv_type, ring=ring, max_seqs=self.layout.max_seqs,
        )  # fmt: skip

    def _rope(self, table: RopeTable) -> Rope:
        turns = Tensor.alloc(self.device, (max(1, len(table.turns)),), "u32", "rope turns")
        self.device.write(turns.buffer, array("I", table.turns or [0]).tobytes())
        return Rope(turns, table.magnitude, 2 * len(table.turns), self.config.arch.rope_neox)

    def _write_step(self, batch: Batch, requests: Sequence[Request]) -> None:
        last, self._last = self._last, batch
        layout = self.layout
        if last is not None and _follows(batch, last):
            for i, (seq, before) in enumerate(zip(batch.seqs, last.seqs, strict=True)):
                if seq.blocks is not before.blocks and seq.blocks != before.blocks:
                    self._write_table(i, seq)
            return
        self.n_writes += 1
        qt = self._qt(_bucket_for(batch.n_rows))
        tiles, records = [], []
        for seq, request in zip(batch.seqs, requests, strict=True):
            if qt > 1:
                for start in range(0, seq.n_rows, qt):
                    tiles.append((seq.row_start + start) | min(qt, seq.n_rows - start) << 16)
            records.append(
                sequence_record(
                    slot=seq.slot,
                    kv_len=seq.kv_len,
                    logits_row=seq.row_start + seq.n_rows - 1 if seq.samples else NONE,
                    draw_position=seq.draw_position,
                    seed=request.seed,
                    params=_sampling_words(request.params),
                )
            )
        words = layout.pack(
            tokens=batch.tokens, positions=batch.positions, row_seqs=batch.row_seq, records=records,
            tiles=tiles, advance=batch.is_decode,
        )  # fmt: skip
        self.device.write(self._step, words)
        for i, seq in enumerate(batch.seqs):
            self._write_table(i, seq)

    def _write_table(self, index: int, seq: SeqSlice) -> None:
        offset = 4 * (self.layout.tables + index * self.layout.max_blocks)
        self.device.write(self._step, array("I", seq.blocks).tobytes(), offset)

    def _adjustment_tables(self) -> tuple[Tensor, Tensor]:
        if self._adjustments is None:
            shape = (self.layout.max_seqs, self.config.n_vocab)
            self._adjustments = (
                Tensor.alloc(self.device, shape, "f32", "logit bias"),
                Tensor.alloc(self.device, shape, "u32", "token counts"),
            )
        return self._adjustments

    def _write_adjustments(self, batch: Batch, requests: Sequence[Request]) -> None:
        """Fill the rows of slots that a request has just entered; later tokens are counted on the device."""
        bias, counts = self._adjustment_tables()
        n_vocab = self.config.n_vocab
        for seq, request in zip(batch.seqs, requests, strict=True):
            params, adjusts = request.params, _adjusts(request.params)
            if not seq.first or not (adjusts or seq.slot in self._adjusted_slots):
                continue
            row = array("f", bytes(4 * n_vocab))
            for token, value in params.logit_bias.items():
                row[token] = value
            self.device.write(bias.buffer, row.tobytes(), 4 * n_vocab * seq.slot)
            tally = array("I", bytes(4 * n_vocab))
            for token in request.prompt_ids:
                tally[token] = 1 << 31
            for token in request.output_ids:
                tally[token] += 1
            self.device.write(counts.buffer, tally.tobytes(), 4 * n_vocab * seq.slot)
            (self._adjusted_slots.add if adjusts else self._adjusted_slots.discard)(seq.slot)


def _bucket_for(n: int) -> int:
    return next(b for b in ROW_BUCKETS if b >= n)


def _adjusts(params: SamplingParams) -> bool:
    return params.penalizes or bool(params.logit_bias)


def _sampling_words(p: SamplingParams) -> bytes:
    return sampling_words(
        temperature=p.temperature, top_k=p.top_k, top_p=p.top_p, min_p=p.min_p,
        repetition=p.repetition_penalty, presence=p.presence_penalty, frequency=p.frequency_penalty,
    )  # fmt: skip


def _follows(batch: Batch, last: Batch) -> bool:
    """Whether the device has made `batch` out of `last` by itself: every sequence one token further."""
    if not (batch.is_decode and last.is_decode and len(batch.seqs) == len(last.seqs)):
        return False
    return all(
        now.request_id == before.request_id
        and now.slot == before.slot
        and now.kv_len == before.kv_len + 1
        and before.samples
        and now.samples
        for now, before in zip(batch.seqs, last.seqs, strict=True)
    )


def room_error(error: DeviceError, needed: int, device: Device) -> DeviceError:
    """A failed allocation in terms of the whole model: what it needs, what was had before it failed."""
    return DeviceError(
        f"{error} (the model needs about {needed / 1e9:.2f} GB on {device.name}; "
        f"{device.allocated / 1e9:.2f} GB were had before this)"
    )
