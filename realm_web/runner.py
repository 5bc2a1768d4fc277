"""Runs batches: one write of the step buffer, one submission of a recorded program, results back.

A program is recorded once for each bucket of rows, sequences and kinds of result, and replayed from then on.
While the same requests decode token after token, not even the step buffer is written: the device advances it.
Knows batches and the device; knows no text and no event loop beyond awaiting the device.
"""

from __future__ import annotations

from array import array
from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from itertools import groupby

from realm_web import ops
from realm_web.errors import OutOfDeviceMemory
from realm_web.kvcache import BLOCK_SIZE, alloc_pages
from realm_web.models.config import ModelConfig
from realm_web.models.rope import RopeTable
from realm_web.models.shortconv import States
from realm_web.models.transformer import Transformer
from realm_web.ops import MATVEC_ROWS, Pages, Recorder, Rope, State, contexts, query_tile
from realm_web.ops.sampling import LOGPROB_WORDS
from realm_web.runtime.device import Device, Program, Readback
from realm_web.sampler import SamplingParams, mask_words
from realm_web.scheduler import Batch, Request, SeqSlice
from realm_web.step import NONE, StepLayout, sampling_words, sequence_record
from realm_web.tensor import PART_ALIGNMENT, Tensor

ROW_BUCKETS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
# Of rows of prompts; compiled when the model is opened, with the bucket of 1. On a software device fewer:
# there compiling is what takes long.
PREFILL_BUCKETS = (16, 32, 64, 128, 256, 512)
FEW_PREFILL_BUCKETS = (32, 128, 512)
FOREVER = 0xFFFFFFFF  # in place of a position
POOLS = {"mean": StepLayout.MEAN, "last": StepLayout.LAST, "cls": StepLayout.CLS}


@dataclass(frozen=True)
class Bucket:
    """What a program is recorded for. The flags from `draw` on are features that some requests ask for."""

    n_rows: int
    n_seqs: int
    context: int  # tokens of its longest sequence, at most
    decode: bool  # every sequence has one row
    sample: bool = True  # some sequence is to get tokens
    draw: bool = False  # some sequence is not greedy
    adjust: bool = False  # some sequence has penalties or a logit bias
    mask: bool = False  # some sequence may not draw every token
    logprobs: bool = False
    score: bool = False
    pool: bool = False
    apart: bool = False  # the mask comes later: the tokens are drawn by a second program


FEATURES = tuple(f.name for f in fields(Bucket))[5:]


def features(request: Request) -> frozenset[str]:
    """What this request asks of a program."""
    if request.task != "generate":
        return frozenset({"score" if request.task == "score" else "pool"})
    params = request.params
    wanted = {
        "draw": not params.greedy,
        "adjust": params.penalizes or bool(params.logit_bias),
        "mask": bool(params.min_tokens) or params.structured,
        "logprobs": params.logprobs,
        "apart": params.structured,
    }
    return frozenset(name for name, yes in wanted.items() if yes)


@dataclass(frozen=True)
class Results:
    """Where in the bytes that come back each kind of result is. Offsets in bytes."""

    logprobs: int
    scores: int
    pooled: int
    end: int

    @classmethod
    def of(cls, max_seqs: int, max_rows: int, dim: int) -> Results:
        ends, end = [], 0
        for words in (max_seqs, max_seqs * LOGPROB_WORDS, max_rows, max_seqs * dim):
            end += -(-4 * words // PART_ALIGNMENT) * PART_ALIGNMENT
            ends.append(end)
        return cls(*ends)


class Runner:
    """A model on a device with its KV cache, for batches of at most max_rows rows and max_seqs sequences."""

    def __init__(
        self,
        device: Device,
        model: Transformer,
        ropes: Sequence[RopeTable],
        *,
        context: int,
        n_blocks: int,
        max_seqs: int,
        max_rows: int,
        kv_type: str,
        prefix_cache: bool,
        n_valid: int,
        exact: bool | None = None,
    ):
        """`context` tokens at most in a sequence, `n_blocks` blocks for all; tokens below n_valid are drawn.

        With a prefix cache every layer keeps every position, also those with a window.
        """
        self.device, self.model = device, model
        self.context, self.n_blocks, self.prefix_cache = context, n_blocks, prefix_cache
        self.max_rows, self.max_seqs, self.kv_type, self.n_valid = max_rows, max_seqs, kv_type, n_valid
        self.exact = exact
        buckets = FEW_PREFILL_BUCKETS if device.info.is_cpu else PREFILL_BUCKETS
        self._prefill_buckets = [b for b in buckets if b < max_rows] + [_bucket_for(max_rows)]
        seqs, rows = _bucket_for(max_seqs), _bucket_for(max_rows)
        self.layout = StepLayout(rows, max_seqs, -(-context // BLOCK_SIZE))
        self._contexts = contexts(device, context)
        self._states = self._alloc_states()
        self.memory = self._memory()
        self._step = device.alloc(4 * self.layout.n_words, "step")
        self._slots = device.alloc(4 * max_seqs, "slots")
        self.results = Results.of(seqs, rows, self.config.dim)
        self._out = device.alloc(self.results.end, "results")
        self._ropes = [self._rope(table) for table in ropes]
        self._arena: dict[str, Tensor] = {}
        # by slot, from the first request on that needs them
        self._tables: dict[str, Tensor] = {}
        self._masks: dict[int, bytes] = {}  # the rows of the mask, by slot, as they are on the device
        self._adjusted_slots: set[int] = set()  # whose rows of logit bias and token counts are not zero
        self._programs: dict[Bucket, Program] = {}
        self._draws: dict[Bucket, Program] = {}  # the second programs of those `apart`
        self._buckets: dict[tuple, Bucket] = {}
        self._asking: list[Request] = []
        # what those ask of a program: the fields of Bucket from `sample` on
        self._asked: tuple[bool, ...] = ()
        self._last: Batch | None = None  # what the step buffer holds, before the device advanced it
        self.n_writes = 0  # of the step buffer

    @property
    def config(self) -> ModelConfig:
        return self.model.config

    async def prepare(self, on_progress: Callable[[int, int], None] | None = None) -> None:
        """Record and compile the programs that one conversation needs."""
        for context in self._contexts:
            self._record(Bucket(1, 1, context, decode=True))
        self._record(Bucket(1, 1, self._contexts[0], decode=True, draw=True))
        for n_rows in self._prefill_buckets:
            if n_rows > 1:
                for context in {self._contexts[0], self.context}:
                    self._record(Bucket(n_rows, 1, context, decode=False))
        await self.device.compile(on_progress)

    def has(self, bucket: Bucket) -> bool:
        return bucket in self._programs

    async def compile(self, bucket: Bucket) -> None:
        """Record and compile the program of a bucket that is used for the first time.

        OutOfDeviceMemory leaves everything as it was.
        """
        arena, tables = dict(self._arena), dict(self._tables)
        try:
            self._record(bucket)
            await self.device.compile()
            if self.device.kind == "browser":  # which tells of a failed allocation afterwards only
                await self.device.synchronize()
        except OutOfDeviceMemory:
            self._programs.pop(bucket, None)
            self._draws.pop(bucket, None)
            for have, before in ((self._arena, arena), (self._tables, tables)):
                for name, tensor in have.items():
                    if before.get(name) is not tensor:
                        self.device.free(tensor.buffer)
                have.clear()
                have.update(before)
            if "mask" not in tables:
                self._masks.clear()
            raise

    def run(self, batch: Batch, bucket: Bucket, requests: Sequence[Request]) -> Readback | None:
        """Submit the batch of these requests, one per sequence; its results are `read` from the bytes.

        None where the tokens are drawn by a `draw` yet to come.
        """
        for seq, request in zip(batch.seqs, requests, strict=True):
            if seq.first:
                self._enter(seq.slot, request)
        self._write_step(batch, bucket, requests)
        return self.device.submit(self._programs[bucket])

    def draw(self, bucket: Bucket, masks: dict[int, bytes]) -> Readback:
        """Draw the tokens of the batch just submitted, in each of these slots only those of its mask."""
        self._write_masks(masks)
        return self.device.submit(self._draws[bucket])

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
        context = next(n for n in self._contexts if longest <= n)
        if not batch.is_decode and n_rows > MATVEC_ROWS:  # the buckets that are compiled already
            n_rows = next(b for b in self._prefill_buckets if b >= n_rows)
            if len(batch.seqs) == 1 and context > self._contexts[0]:
                context = self.context
        if requests != self._asking:  # the same ones decode for many steps
            wanted = frozenset().union(*map(features, requests))
            sample = any(request.task == "generate" for request in requests)
            self._asking = list(requests)
            self._asked = (sample, *(name in wanted for name in FEATURES))
        key = n_rows, _bucket_for(len(batch.seqs)), context, batch.is_decode, *self._asked
        if key not in self._buckets:
            self._buckets[key] = Bucket(*key)
        return self._buckets[key]

    def _record(self, bucket: Bucket) -> None:
        """Record the whole pass for a bucket. New kernels are still to be compiled."""
        device, model = self.device, self.model
        program = device.program(str(bucket))
        recorder = Recorder(
            device, program, self.layout, device.view(self._step), device.view(self._slots),
            bucket.n_rows, bucket.n_seqs, self._qt(bucket), bucket.context, self._arena, self.exact,
            bucket.decode,
        )  # fmt: skip
        x = model.record_hidden(recorder, self.memory, self._ropes)
        end = 4 * bucket.n_seqs
        if bucket.score:
            scores = device.view(self._out, self.results.scores, 4 * bucket.n_rows)
            model.record_scores(recorder, x, scores, n_valid=self.n_valid)
            end = scores.offset + scores.nbytes
        if bucket.pool:
            dim = self.config.dim
            pooled = device.view(self._out, self.results.pooled, 4 * bucket.n_seqs * dim)
            model.record_pool(recorder, x, self._table("pooled", dim, "f32"), pooled)
            end = pooled.offset + pooled.nbytes
        if bucket.sample:
            logits = model.record_logits(recorder, x)
            if bucket.apart:
                recorder = replace(recorder, program=device.program(f"{bucket}, draw"))
                self._draws[bucket] = recorder.program
            end = max(end, self._record_draw(recorder, bucket, logits))
        recorder.program.readback = device.view(self._out, 0, end)
        self._programs[bucket] = program

    def _record_draw(self, r: Recorder, bucket: Bucket, logits: Tensor) -> int:
        """From logits to tokens; where their results end."""
        view, n_vocab = self.device.view, self.config.n_vocab
        end = 4 * bucket.n_seqs
        options = {}
        if bucket.adjust:
            options["bias"] = self._table("bias", n_vocab, "f32")
            options["counts"] = self._table("counts", n_vocab, "u32")
        if bucket.mask:
            options["mask"] = self._table("mask", -(-n_vocab // 32), "u32")
        if bucket.logprobs:
            nbytes = 4 * LOGPROB_WORDS * bucket.n_seqs
            options["logprobs"] = view(self._out, self.results.logprobs, nbytes)
            end = self.results.logprobs + nbytes
        out = view(self._out, 0, 4 * bucket.n_seqs)
        ops.sample(r, logits, out, draw=bucket.draw, n_valid=self.n_valid, **options)
        return end

    def _table(self, name: str, width: int, dtype: str) -> Tensor:
        """Memory with a row for each slot, kept for a feature that few requests use."""
        if name not in self._tables:
            self._tables[name] = Tensor.alloc(self.device, (self.max_seqs, width), dtype, name)
        return self._tables[name]

    def _qt(self, bucket: Bucket) -> int:
        """Query rows per attention tile: one where rows are few or of a sequence each."""
        if bucket.decode or bucket.n_rows <= MATVEC_ROWS:
            return 1
        return query_tile(self.device, self.config.heads_per_kv, self.config.head_dim)

    def _alloc_states(self) -> States | None:
        config = self.config
        n_layers = sum(not layer.n_kv_heads for layer in config.layers)
        if not n_layers:
            return None
        return States(
            self.device, max_seqs=self.max_seqs, n_layers=n_layers, length=config.l_cache - 1, dim=config.dim
        )

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
        """Blocks of the shared pool; without a prefix cache a layer with a window may have its own rings."""
        ring = -(-(window + self.max_rows) // BLOCK_SIZE) + 1
        if self.prefix_cache or not window or ring * self.max_seqs >= self.n_blocks:
            ring = 0
        return alloc_pages(
            self.device, n_kv_heads, self.config.head_dim, n_blocks=self.n_blocks, block_size=BLOCK_SIZE,
            dtype=self.kv_type, ring=ring, max_seqs=self.max_seqs,
        )  # fmt: skip

    def _rope(self, table: RopeTable) -> Rope:
        turns = Tensor.alloc(self.device, (max(1, len(table.turns)),), "u32", "rope turns")
        self.device.write(turns.buffer, array("I", table.turns or [0]).tobytes())
        return Rope(turns, table.magnitude, 2 * len(table.turns), self.config.arch.rope_neox)

    def _write_step(self, batch: Batch, bucket: Bucket, requests: Sequence[Request]) -> None:
        last, self._last = self._last, batch
        if last is not None and _follows(batch, last):
            for i, (seq, before) in enumerate(zip(batch.seqs, last.seqs, strict=True)):
                if seq.blocks is not before.blocks and seq.blocks != before.blocks:
                    self._write_blocks(i, seq.blocks, before.blocks)
            return
        self.n_writes += 1
        layout = self.layout
        qt = self._qt(bucket)
        tiles, targets, records = [], [], []
        for seq, request in zip(batch.seqs, requests, strict=True):
            if qt > 1:
                for start in range(0, seq.n_rows, qt):
                    tiles.append((seq.row_start + start) | min(qt, seq.n_rows - start) << 16)
            if request.task == "score":
                targets += [NONE] * (seq.row_start - len(targets))
                for position in range(
                    seq.kv_len - seq.n_rows + 1, min(seq.kv_len + 1, len(request.prompt_ids))
                ):
                    targets.append(request.prompt_ids[position] if position >= request.first_scored else NONE)
            records.append(self._sequence_record(seq, request))
        words = layout.pack(
            tokens=batch.tokens, positions=batch.positions, row_seqs=batch.row_seq, records=records,
            tiles=tiles, advance=batch.is_decode, targets=targets, tables=[seq.blocks for seq in batch.seqs],
        )  # fmt: skip
        self.device.write(self._step, words)

    def _sequence_record(self, seq: SeqSlice, request: Request) -> bytes:
        params = request.params
        return sequence_record(
            slot=seq.slot,
            kv_len=seq.kv_len,
            logits_row=seq.row_start + seq.n_rows - 1 if seq.samples else NONE,
            draw_position=seq.draw_position,
            seed=request.seed,
            params=_sampling_words(params),
            mask_until=_mask_until(request),
            top_logprobs=params.top_logprobs + 1 if params.logprobs else 0,
            adapter=request.adapter,
            pool=POOLS.get(request.pooling, StepLayout.NO_POOL),
        )

    def _write_masks(self, masks: Mapping[int, bytes]) -> None:
        """Those that are not on the device yet, neighbours in one write: each is a copy that the draw awaits.

        Inside of a string, say, the mask is the same after most tokens.
        """
        mask = self._table("mask", -(-self.config.n_vocab // 32), "u32")
        slots = sorted(slot for slot, words in masks.items() if self._masks.get(slot) != words)
        self._masks.update(masks)
        for _, run in groupby(enumerate(slots), lambda pair: pair[1] - pair[0]):
            together = [slot for _, slot in run]
            words = b"".join(masks[slot] for slot in together)
            self.device.write(mask.buffer, words, 4 * mask.shape[1] * together[0])

    def _write_blocks(self, index: int, blocks: Sequence[int], before: Sequence[int]) -> None:
        """The block table of the index-th sequence, from the first block on that is another than before."""
        start = len(before) if blocks[: len(before)] == before else 0
        offset = 4 * (self.layout.tables + index * self.layout.max_blocks + start)
        self.device.write(self._step, array("I", blocks[start:]).tobytes(), offset)

    def _enter(self, slot: int, request: Request) -> None:
        """Fill the rows of a slot that a request has just entered; later tokens are counted on the device."""
        n_vocab, params, wanted = self.config.n_vocab, request.params, features(request)
        if "adjust" in wanted or slot in self._adjusted_slots:
            bias, counts = self._table("bias", n_vocab, "f32"), self._table("counts", n_vocab, "u32")
            row = array("f", bytes(4 * n_vocab))
            for token, value in params.logit_bias.items():
                row[token] = value
            self.device.write(bias.buffer, row.tobytes(), 4 * n_vocab * slot)
            tally = array("I", bytes(4 * n_vocab))
            for token in request.prompt_ids:
                tally[token] = 1 << 31
            for token in request.output_ids:
                tally[token] += 1
            self.device.write(counts.buffer, tally.tobytes(), 4 * n_vocab * slot)
            (self._adjusted_slots.add if "adjust" in wanted else self._adjusted_slots.discard)(slot)
        if "mask" in wanted and "apart" not in wanted:
            self._write_masks({slot: mask_words(n_vocab, banned=request.stop_ids)})


def _bucket_for(n: int) -> int:
    return ROW_BUCKETS[bisect_left(ROW_BUCKETS, n)]


def _sampling_words(p: SamplingParams) -> bytes:
    return sampling_words(
        temperature=p.temperature, top_k=p.top_k, top_p=p.top_p, min_p=p.min_p,
        repetition=p.repetition_penalty, presence=p.presence_penalty, frequency=p.frequency_penalty,
    )  # fmt: skip


def _mask_until(request: Request) -> int:
    """Up to which position the slot's mask applies to draws; 0 where there is none."""
    params = request.params
    if "apart" in features(request):
        return FOREVER
    return len(request.prompt_ids) + params.min_tokens if params.min_tokens else 0


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
