"""Valid tiny models of several architectures, and files made of them with something wrong in it.

A `Parts` is a GGUF file taken apart, so that a mutation changes what it means and the rest of the file stays
right: flipped bytes alone hardly come past the parser. `mutate` takes any `random.Random`, so hypothesis and
atheris use the same mutations. `attempt` does with a file all that a user would: load,
encode, chat, generate.
"""

import asyncio
import gc
import math
import random
import re
import resource
import signal
import struct
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from tiny import write_tiny

from realm_web.engine import Engine
from realm_web.errors import DeviceError, RealmError
from realm_web.gguf import parse
from realm_web.sampler import SamplingParams

ARRAY, STRING = 9, 8
SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "B", 10: "Q", 11: "q", 12: "d"}
SECONDS = 20  # for one file; a valid one takes 0.05
MEMORY = 512 << 20  # bytes of address space beyond what there is before
TEXT = "hello  world <|im_start|>\n\ta<0x41>\u00e9\U0001f600"


@dataclass
class Entry:
    """A metadata key. `value` is a number, bytes, or a list; `kind` the type of it or its elements."""

    key: bytes
    kind: int
    value: int | float | bytes | list
    count: int | None = None  # what an array claims to hold, if not what it holds

    def packed(self) -> bytes:
        head = _text(self.key)
        if not isinstance(self.value, list):
            return head + struct.pack("<I", self.kind) + _packed(self.kind, self.value)
        count = len(self.value) if self.count is None else self.count
        head += struct.pack("<IIQ", ARRAY, self.kind, count)
        return head + b"".join(_packed(self.kind, value) for value in self.value)


@dataclass
class Piece:
    """A tensor."""

    name: bytes
    shape: tuple[int, ...]
    kind: int
    data: bytes
    offset: int | None = None  # if not where its data is


@dataclass
class Parts:
    """A file taken apart."""

    entries: list[Entry]
    pieces: list[Piece]
    version: int = 3
    n_entries: int | None = None  # what the header claims, if not what there is
    n_pieces: int | None = None
    alignment: int = 32
    cut: int | None = None  # bytes that are left
    flips: list[tuple[int, int]] = field(default_factory=list)

    def file(self) -> bytes:
        n_pieces = len(self.pieces) if self.n_pieces is None else self.n_pieces
        n_entries = len(self.entries) if self.n_entries is None else self.n_entries
        head = [b"GGUF" + struct.pack("<IQQ", self.version, n_pieces, n_entries)]
        head += [entry.packed() for entry in self.entries]
        data, offset = [], 0
        for piece in self.pieces:
            at = offset if piece.offset is None else piece.offset
            n_dims = len(piece.shape)
            head.append(
                _text(piece.name) + struct.pack(f"<I{n_dims}QIQ", n_dims, *piece.shape, piece.kind, at)
            )
            padded = piece.data + bytes(-len(piece.data) % self.alignment)
            data.append(padded)
            offset += len(padded)
        start = b"".join(head)
        whole = bytearray(start + bytes(-len(start) % self.alignment) + b"".join(data))
        for at, mask in self.flips:
            whole[at % len(whole)] ^= mask
        return bytes(whole[: self.cut])


def _text(raw: bytes) -> bytes:
    return struct.pack("<Q", len(raw)) + raw


def _packed(kind: int, value: int | float | bytes) -> bytes:
    return _text(value) if kind == STRING else struct.pack("<" + SCALARS.get(kind, "I"), value)


def take_apart(data: bytes) -> Parts:
    """Of a valid file without nested arrays."""
    gguf = parse(data, len(data))
    entries, pos = [], 24

    def number(code: str):
        nonlocal pos
        (value,) = struct.unpack_from("<" + code, data, pos)
        pos += struct.calcsize("<" + code)
        return value

    def text() -> bytes:
        nonlocal pos
        length = number("Q")
        pos += length
        return data[pos - length : pos]

    def element(kind: int):
        return text() if kind == STRING else number(SCALARS[kind])

    for _ in range(len(gguf.metadata)):
        key, kind = text(), number("I")
        if kind == ARRAY:
            kind, count = number("I"), number("Q")
            entries.append(Entry(key, kind, [element(kind) for _ in range(count)]))
        else:
            entries.append(Entry(key, kind, element(kind)))
    pieces = [
        Piece(info.name.encode(), info.shape, info.ggml_type, data[info.offset : info.offset + info.nbytes])
        for info in gguf.tensors.values()
    ]
    return Parts(entries, pieces)


# -- valid models -------------------------------------------------------------------------------------

VOCAB = 300
DIM = 32
SHAPE = {"n_layers": 2, "dim": DIM, "n_heads": 2, "n_kv_heads": 1, "ffn": 32, "vocab": VOCAB, "context": 64}


def _of_layers(n_layers: int, **shapes: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
    return {
        f"blk.{i}.{name.replace('__', '.')}": shape for i in range(n_layers) for name, shape in shapes.items()
    }


def _pieces() -> dict[str, object]:
    """A vocabulary of SentencePiece's kind, with tokens of every type."""
    words = re.findall(r"\S+", "\u2581 \u2581h ll he hell hello \u2581hello \u2581w or wor ld \u2581world")
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *"abdehlorw", *words]
    types = [2, 3, 3, *[6] * 256, *[1] * (9 + len(words))]
    tokens += ["<tool>", "<end_of_turn>", "lo wo"]
    types += [4, 3, 5]
    rest = VOCAB - len(tokens)
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.tokens": tokens + [f"unused{i}" for i in range(rest)],
        "tokenizer.ggml.token_type": types + [1] * rest,
        "tokenizer.ggml.scores": [-float(i) for i in range(VOCAB)],
        "tokenizer.ggml.merges": None,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.add_bos_token": True,
        "tokenizer.ggml.add_space_prefix": True,
    }


_POST_NORMS = {"post_attention_norm__weight": (DIM,), "post_ffw_norm__weight": (DIM,)}
_HEAD_NORMS = {"attn_q_norm__weight": (16,), "attn_k_norm__weight": (16,)}
_EXPERTS = {
    "ffn_gate_inp__weight": (4, DIM),
    "ffn_gate_exps__weight": (4, 32, DIM),
    "ffn_up_exps__weight": (4, 32, DIM),
    "ffn_down_exps__weight": (4, DIM, 32),
}
_DENSE = [f"blk.{i}.ffn_{name}.weight" for i in range(2) for name in ("gate", "up", "down")]

MODELS: Mapping[str, Mapping[str, object]] = {
    "llama": {
        "biases": ("attn_q", "attn_k", "attn_v"),
        "rope_freqs": True,
        "chat_template": "{{ messages[0].content }}",
        "quant": "Q4_0",
    },
    "qwen2": {
        "architecture": "qwen2",
        "tied": True,
        "quant": {"*embd*": "Q8_0", "*": "F16"},
        "pre": "qwen2",
        "rope_scaling": {"type": "yarn", "factor": 4.0, "original_context_length": 32},
    },
    "gemma3": {
        "architecture": "gemma3",
        "tied": True,
        "quant": "Q5_1",
        "shapes": _of_layers(2, **_POST_NORMS, **_HEAD_NORMS),
        "metadata": {
            **_pieces(),
            "gemma3.attention.sliding_window": 8,
            "gemma3.attention.sliding_window_pattern": 2,
            "gemma3.final_logit_softcapping": 30.0,
        },
    },
    "gpt-oss": {
        "architecture": "gpt-oss",
        "quant": {"*.bias": "F32", "*": "Q8_0"},
        "omit": (*_DENSE, "blk.0.ffn_norm.weight", "blk.1.ffn_norm.weight"),
        "shapes": _of_layers(
            2,
            **_EXPERTS,
            attn_sinks__weight=(2,),
            post_attention_norm__weight=(DIM,),
            ffn_gate_exps__bias=(4, 32),
        ),
        "metadata": {
            "gpt-oss.expert_count": 4,
            "gpt-oss.expert_used_count": 2,
            "gpt-oss.expert_feed_forward_length": 32,
            "gpt-oss.attention.sliding_window": 8,
            "gpt-oss.expert_gating_func": 3,
        },
    },
    "lfm2": {
        "architecture": "lfm2",
        "quant": {"*conv.conv*": "F32", "*": "Q4_1"},
        "omit": [f"blk.0.attn_{name}.weight" for name in ("q", "k", "v", "output")],
        "shapes": {
            "blk.0.shortconv.in_proj.weight": (3 * DIM, DIM),
            "blk.0.shortconv.conv.weight": (DIM, 3),
            "blk.0.shortconv.out_proj.weight": (DIM, DIM),
            "blk.1.attn_q_norm.weight": (16,),
            "blk.1.attn_k_norm.weight": (16,),
        },
        "metadata": {"lfm2.attention.head_count_kv": [0, 1], "lfm2.shortconv.l_cache": 3},
    },
    "phi3": {
        "architecture": "phi3",
        "quant": "BF16",
        "omit": [
            f"blk.{i}.{name}.weight" for i in range(2) for name in ("attn_q", "attn_k", "attn_v", "ffn_gate")
        ],
        "shapes": {
            **_of_layers(2, attn_qkv__weight=(64, DIM), ffn_up__weight=(64, DIM)),
            "rope_factors_long.weight": (8,),
            "rope_factors_short.weight": (8,),
        },
        "metadata": {
            **_pieces(),
            "phi3.rope.scaling.original_context_length": 32,
            "phi3.attention.sliding_window": 16,
        },
    },
}


@cache
def model(name: str) -> Parts:
    with TemporaryDirectory() as folder:
        path = Path(folder) / "tiny.gguf"
        write_tiny(path, **{**SHAPE, **MODELS[name]})
        parts = take_apart(path.read_bytes())
    for piece in parts.pieces:
        if piece.name.startswith(b"rope_factors"):  # random otherwise, and they must be positive
            piece.data = struct.pack("<8f", *(1.0 + i for i in range(8)))
    return parts


# -- something wrong ----------------------------------------------------------------------------------

# fmt: off
NUMBERS = (
    0, 1, 2, 3, 4, 7, 8, 15, 16, 31, 32, 33, 48, 64, 255, 256, 300, 4096, 65535, 1 << 20, 1 << 24,
    (1 << 31) - 1, 1 << 31, (1 << 32) - 1, 1 << 40, (1 << 63) - 1, (1 << 64) - 1, -1, -2,
    -(1 << 31), -(1 << 63),
)
FLOATS = (
    0.0, -0.0, 1.0, 0.5, -1.0, 1e-45, 1e-30, 1e-6, 1e6, 1e30, 3e38, 1e308, math.inf, -math.inf, math.nan,
)
STRINGS = (
    b"", b" ", b"x", b"\n", b"a b", b"\xff", b"\x1b[31mred\nline", b"long" * 9999, b"<s>", b"<0xZZ>", b"[",
    b"]^-\\", b"llama", b"gpt2", b"qwen2", b"gemma3", b"phi3", b"lfm2", b"default", b"yarn", b"linear",
    b"longrope", b"none", "\u2581\u2581".encode(), "\u0130\u00df".encode(),
    b"{% for i in range(10**9) %}x{% endfor %}", b"{{ 'a' * 10**9 }}", b"{{", b"Phi-3",
)
NAMES = (
    b"blk.0.attn_q.bias", b"blk.1.ffn_down.bias", b"rope_freqs.weight", b"blk.\xc2\xb2.x", b"blk.-1.x",
    b"blk.0.attn_q_norm.weight", b"rope_factors_short.weight", b"blk..", b"blk." + b"9" * 5000 + b".x",
)
# fmt: on
# keys that are read where they are present
OPTIONAL = re.findall(
    r"\S+",
    """
    vocab_size attention.key_length attention.value_length attention.head_count_kv attention.scale
    rope.dimension_count rope.freq_base rope.freq_base_swa rope.scale_linear rope.scaling.type
    rope.scaling.factor rope.scaling.attn_factor rope.scaling.original_context_length
    rope.scaling.yarn_beta_fast rope.scaling.yarn_beta_slow rope.scaling.finetuned embedding_scale
    residual_scale logit_scale attn_logit_softcapping final_logit_softcapping expert_count
    expert_used_count expert_feed_forward_length expert_gating_func expert_weights_norm
    expert_weights_scale attention.sliding_window attention.sliding_window_pattern shortconv.l_cache
    feed_forward_length
""",
)
OPTIONAL_OF_FILE = re.findall(
    r"\S+",
    """
    general.alignment general.name tokenizer.chat_template tokenizer.ggml.add_bos_token
    tokenizer.ggml.add_eos_token tokenizer.ggml.add_space_prefix tokenizer.ggml.remove_extra_whitespaces
    tokenizer.ggml.eot_token_id tokenizer.ggml.eom_token_id tokenizer.ggml.padding_token_id
    tokenizer.ggml.unknown_token_id tokenizer.ggml.fim_pre_token_id tokenizer.ggml.fim_pad_token_id
    tokenizer.ggml.scores tokenizer.ggml.merges tokenizer.ggml.pre tokenizer.ggml.token_type
""",
)


def mutate(parts: Parts, rng: random.Random) -> Parts:
    """A copy with one thing wrong, or one thing else that is right too."""
    parts = deepcopy(parts)
    rng.choice(MUTATIONS)(parts, rng)
    return parts


def _number(kind: int, rng: random.Random) -> int | float:
    if kind in (6, 12):
        value = rng.choice((*FLOATS, *NUMBERS))
        return float("inf") if kind == 6 and abs(value) > 3.4e38 else float(value)
    if kind == 7:
        return rng.choice((0, 1, 1, 2, 255))
    bits = 8 * struct.calcsize(SCALARS.get(kind, "I"))
    value = rng.choice(NUMBERS) % (1 << bits)
    return value - (1 << bits) if SCALARS.get(kind, "I").islower() and value >> (bits - 1) else value


def _value(kind: int, rng: random.Random) -> int | float | bytes:
    return rng.choice(STRINGS) if kind == STRING else _number(kind, rng)


def _kind(rng: random.Random) -> int:
    return rng.choice((*SCALARS, STRING, STRING, 4, 5, 6))


def _other_value(parts: Parts, rng: random.Random) -> None:
    """The type stays: what is wrong, if anything, is the value."""
    entry = rng.choice([entry for entry in parts.entries if not isinstance(entry.value, list)])
    entry.value = _value(entry.kind, rng)


def _other_type(parts: Parts, rng: random.Random) -> None:
    entry = rng.choice(parts.entries)
    entry.kind = _kind(rng)
    entry.value = _value(entry.kind, rng)
    if rng.random() < 0.3:
        entry.value = [_value(entry.kind, rng) for _ in range(rng.choice((0, 1, 2, VOCAB)))]


def _other_list(parts: Parts, rng: random.Random) -> None:
    lists = [entry for entry in parts.entries if isinstance(entry.value, list)]
    entry = rng.choice(lists)
    values = entry.value
    at = rng.randrange(len(values) + 1)
    match rng.randrange(6):
        case 0:
            del values[at:]
        case 1:
            values.insert(at, _value(entry.kind, rng))
        case 2:
            values *= rng.choice((0, 2, 50))
        case 3:
            entry.count = _number(10, rng)
        case _:
            for _ in range(rng.choice((1, 1, 5))):
                if values:
                    values[at % len(values)] = _value(entry.kind, rng)
                at = rng.randrange(len(values) + 1)


def _odd_token(parts: Parts, rng: random.Random) -> None:
    """Another string, type, score, merge or special id, within the lists' lengths."""
    ours = [one for one in parts.entries if one.key.startswith(b"tokenizer.ggml.") and one.value != []]
    entry = rng.choice(ours)
    if not isinstance(entry.value, list):
        entry.value = rng.randrange(VOCAB) if entry.kind in (4, 5) else _value(entry.kind, rng)
        return
    at, other = rng.randrange(len(entry.value)), rng.randrange(len(entry.value))
    if entry.kind == STRING:
        entry.value[at] = rng.choice((entry.value[other] + b" ", entry.value[other][1:], *STRINGS))
    else:
        entry.value[at] = rng.choice((entry.value[other], _number(entry.kind, rng)))


def _fewer_entries(parts: Parts, rng: random.Random) -> None:
    del parts.entries[rng.randrange(len(parts.entries))]


def _more_entries(parts: Parts, rng: random.Random) -> None:
    arch = next((entry.value for entry in parts.entries if entry.key == b"general.architecture"), b"llama")
    arch = arch if isinstance(arch, bytes) else b"llama"
    key = rng.choice(
        [arch + b"." + name.encode() for name in OPTIONAL] + [n.encode() for n in OPTIONAL_OF_FILE]
    )
    if rng.random() < 0.95:
        parts.entries = [entry for entry in parts.entries if entry.key != key]
    kind = _kind(rng)
    value = _value(kind, rng)
    if rng.random() < 0.3:
        value = [_value(kind, rng) for _ in range(rng.choice((0, 1, 2, VOCAB)))]
    parts.entries.insert(rng.randrange(len(parts.entries) + 1), Entry(key, kind, value))


def _other_shape(parts: Parts, rng: random.Random) -> None:
    piece = rng.choice(parts.pieces)
    shape = list(piece.shape)
    match rng.randrange(5):
        case 0:
            shape[rng.randrange(len(shape))] = _number(10, rng)
        case 1:
            shape.reverse()
        case 2:
            shape.append(rng.choice((0, 1, 1, 2)))
        case 3:
            shape.pop()
        case 4:
            shape[0], shape[-1] = shape[0] * 2, shape[-1] // 2
    piece.shape = tuple(shape)


def _other_tensor(parts: Parts, rng: random.Random) -> None:
    piece, other = rng.choice(parts.pieces), rng.choice(parts.pieces)
    match rng.randrange(7):
        case 0:
            piece.kind = rng.choice((*range(42), (1 << 32) - 1))
            piece.data = piece.data * rng.choice((1, 2, 8))
        case 1:
            piece.offset = _number(10, rng)
        case 2:
            piece.name = rng.choice((other.name, other.name.replace(b".0.", b".9."), *STRINGS))
        case 3:
            parts.pieces = [one for one in parts.pieces if one is not piece]
        case 4:
            name = rng.choice(NAMES)
            parts.pieces.append(Piece(name, piece.shape, piece.kind, piece.data))
        case 5:
            rng.shuffle(parts.pieces)
        case 6:
            piece.data = piece.data[: rng.choice((0, 1, 32))]


def _other_weights(parts: Parts, rng: random.Random) -> None:
    for piece in rng.choice((parts.pieces, [rng.choice(parts.pieces)])):
        n = len(piece.data)
        word = rng.choice((b"\xff\xff\xff\xff", bytes(4), b"\x7f" * 4, b"\0\0\x80\x7f", b"\0\x7c\0\x7c"))
        piece.data = rng.choice((word * (n // 4), piece.data[::-1], rng.randbytes(n)))
        piece.data += bytes(n - len(piece.data))


def _other_container(parts: Parts, rng: random.Random) -> None:
    match rng.randrange(5):
        case 0:
            parts.version = rng.choice((0, 1, 2, 2, 4, 3 << 24, (1 << 32) - 1))
        case 1:
            parts.n_entries = _number(10, rng)
        case 2:
            parts.n_pieces = _number(10, rng)
        case 3:
            parts.cut = rng.randrange(len(parts.file()))
        case 4:
            end = rng.choice((64, 1 << 10, 1 << 30))
            parts.flips += [
                (rng.randrange(end), 1 << rng.randrange(8)) for _ in range(rng.choice((1, 4, 64)))
            ]


MUTATIONS = (
    _other_value, _other_value, _other_type, _other_list, _odd_token, _odd_token, _fewer_entries,
    _more_entries, _more_entries, _other_shape, _other_tensor, _other_weights, _other_container,
)  # fmt: skip


# -- all that a user would do with it -----------------------------------------------------------------


class BytesSource:
    """A file in memory."""

    def __init__(self, data: bytes):
        self.name, self.size, self._data = "file.gguf", len(data), data

    async def read(self, offset: int, nbytes: int) -> bytes:
        data = self._data[offset : offset + nbytes]
        return data + bytes(nbytes - len(data))

    async def read_bytes(self, offset: int, nbytes: int) -> bytes:
        return self._data[offset : offset + nbytes]

    def close(self) -> None:
        pass


class TooSlow(BaseException):
    """A file kept us busy for longer than it may. No Exception, so that no handler takes it for its own."""


def attempt(data: bytes) -> RealmError | None:
    """Load the file and use it. The one clear error that it gave, if it gave one; other exceptions pass."""
    try:
        with limits():
            asyncio.run(_use(data))
    except RealmError as error:
        check_error(error)
        return error
    return None


def check_error(error: RealmError) -> None:
    """One short line, and not about the machine: a file of a few kilobytes is never too large for it."""
    line = str(error)
    assert line and len(line) < 700 and line.isprintable(), f"not one short line: {line[:2000]!r}"
    assert not isinstance(error, DeviceError), f"a tiny file took all memory: {line}"


@contextmanager
def limits() -> Iterator[None]:
    """Seconds and bytes for what is done within."""
    _start_blas()
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    before = resource.getrlimit(resource.RLIMIT_AS)
    handler = signal.signal(signal.SIGALRM, _too_slow)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + MEMORY, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, signal.SIG_DFL if handler is None else handler)


@cache
def _start_blas() -> None:
    """Its threads and their buffers come with the first large product, and do not count."""
    square = np.ones((512, 512), np.float32)
    square @ square


def _too_slow(*_: object) -> None:
    raise TooSlow(f"a file took more than {SECONDS} seconds")


async def _use(data: bytes) -> None:
    packed = len(data) % 2 == 1  # weights stay as they are, or become float32
    engine = await Engine.open(
        BytesSource(data), device="cpu", max_seqs=1, max_rows=8, cpu_dequant=not packed
    )
    try:
        tokenizer = engine.tokenizer
        for text in (TEXT, "hello" * 40, " ", ""):
            tokenizer.decode(tokenizer.encode(text))
        for params in (SamplingParams(temperature=0, max_tokens=2), SamplingParams(seed=1, max_tokens=2)):
            async for _ in engine.generate([1, 2, 0], params):
                pass
        async for _ in engine.generate(TEXT, SamplingParams(temperature=0, max_tokens=2)):
            pass
        try:
            engine.chat_prompt([{"role": "user", "content": "hello"}])
        except RealmError as error:  # a template that is wrong does not keep a model from being used
            check_error(error)
    finally:
        await engine.close()
        gc.collect(0)
