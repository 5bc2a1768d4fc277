"""The operations of a forward pass, recorded into a program: which kernel, which variant, which grid.

Knows the limits of the device and no architecture. A variant is a set of template constants of one kernel;
all of them compute the same function.
"""

from __future__ import annotations

from dataclasses import dataclass

from realm_web.runtime.device import Device, Program, View
from realm_web.step import StepLayout
from realm_web.tensor import Tensor, Weight

MATVEC_ROWS = 8  # up to so many rows the matrix-vector kernel reads the weights once for all of them
SAMPLE_PARTS = 64


@dataclass(frozen=True)
class Matvec:
    """Tuning constants of `matvec`: every choice gives the same numbers up to rounding."""

    lanes: int  # threads that share one weight row
    rows: int  # weight rows of each such group
    wg: int
    m_tile: int
    subgroup: int

    def grid(self, device: Device, n: int, m: int) -> tuple[tuple[int, int, int], int]:
        """The grid, and how wide its first dimension is folded."""
        blocks = -(-n // (self.wg // self.lanes * self.rows))
        x = min(blocks, device.limits.max_workgroups)
        return (x, -(-m // self.m_tile), -(-blocks // x)), x


def choose_matvec(device: Device, n: int, k: int, m: int) -> Matvec:
    """Defaults measured on llvmpipe, SwiftShader and an NVIDIA H200 (bench/NOTES.md)."""
    m_tile = min(MATVEC_ROWS, 1 << (m - 1).bit_length())
    if device.info.is_cpu:  # no barriers, no reductions: a thread per row
        return Matvec(lanes=1, rows=1, wg=64, m_tile=m_tile, subgroup=0)
    size = device.subgroup_size
    if not size:
        return Matvec(lanes=16, rows=1, wg=64, m_tile=m_tile, subgroup=0)
    if n * k < 1 << 22 or m_tile > 2:  # too few rows to fill the GPU, or too many sums for the registers
        return Matvec(lanes=size, rows=1, wg=max(64, size), m_tile=m_tile, subgroup=size)
    if n >= 1 << 15:
        return Matvec(lanes=size, rows=4, wg=64, m_tile=m_tile, subgroup=size)
    return Matvec(lanes=2 * size, rows=4, wg=256, m_tile=m_tile, subgroup=size)


def choose_experts(device: Device) -> Matvec:
    """For the matrices of chosen experts, of which every row of x has its own."""
    size = device.subgroup_size
    lanes = 1 if device.info.is_cpu else size or 16
    return Matvec(lanes=lanes, rows=1, wg=max(64, lanes), m_tile=1, subgroup=size if lanes == size else 0)


@dataclass(frozen=True)
class Rope:
    """How a layer rotates its queries and keys; dim 0 is not at all."""

    turns: Tensor  # (dim / 2,) u32: turns per position as fractions of 2**32
    magnitude: float
    dim: int
    neox: bool  # pairs are (i, i + dim / 2) rather than (2i, 2i + 1)


@dataclass(frozen=True)
class Pages:
    """Keys and values of one layer: (n_blocks, n_kv, block_size, head_dim) each, f16 or f32.

    With a ring, each slot has `ring` blocks of its own and writes them round and round; the block tables do
    not count.
    """

    k: Tensor
    v: Tensor
    ring: int


@dataclass(frozen=True)
class State:
    """What a short convolution keeps of each slot's sequence: its last `length` values, (length, dim) f32."""

    values: View
    length: int
    stride: int  # elements from one slot to the next


def query_tile(device: Device, group: int, head_dim: int) -> int:
    """Query rows of `group` heads that an attention workgroup keeps: what fits 16 queries and its memory."""
    per_query = 4 * (2 * head_dim + 64 + 8)
    return max(1, min(16, device.limits.max_shared // per_query) // group)


@dataclass
class Recorder:
    """Records one forward pass for at most `n_rows` tokens of at most `n_seqs` sequences."""

    device: Device
    program: Program
    layout: StepLayout
    step: View
    slots: View
    n_rows: int
    n_seqs: int
    qt: int  # query rows per attention tile
    splits: int  # of the context, in attention
    arena: dict[str, Tensor]  # scratch by name, shared by all programs of an engine

    def scratch(self, name: str, *shape: int) -> Tensor:
        """A float32 scratch tensor; same name, same memory, so a layer's lives until the next one's."""
        size = 1
        for d in shape:
            size *= d
        have = self.arena.get(name)
        if have is None or have.nbytes < 4 * size:
            have = self.arena[name] = Tensor.alloc(self.device, (size,), "f32", f"scratch {name}")
        return Tensor(have.buffer, 0, -(-4 * size // 16) * 16, shape, "f32")

    def embed(self, weight: Weight, out: Tensor, scale: float = 1.0) -> None:
        for shard in weight.shards:
            kernel = self.device.kernel(
                "embed", fmt=weight.fmt.name, dim=weight.k, first_row=shard.first_row,
                n_shard_rows=shard.n_rows, scale=scale, st=self.layout,
            )  # fmt: skip
            threads = self.n_rows * weight.k // 32
            self._add(
                kernel,
                (self.step, self.slots, *shard.parts, out),
                (-(-threads // 64),),
                f"embed {weight.label}",
            )

    def rmsnorm(
        self, x: Tensor, weight: Tensor, out: Tensor, eps: float, *,
        gather: bool = False, residual: bool = False,
    ) -> None:  # fmt: skip
        """out = norm(x) * weight, or += with residual. gather: out's rows are those that draw a token."""
        wg = 64 if self.device.info.is_cpu else 256
        kernel = self.device.kernel(
            "rmsnorm", dim=x.shape[-1], eps=eps, gather=gather, residual=residual, wg=wg,
            subgroup=self.device.subgroup_size,
            st=self.layout,
        )  # fmt: skip
        self._add(kernel, (self.step, x, weight, out), (self.n_seqs if gather else self.n_rows,))

    def linear(
        self,
        x: Tensor,
        weight: Weight,
        out: Tensor,
        *,
        bias: Tensor | None = None,
        residual: bool = False,
        act: str = "",
        scale: float = 1.0,
        softcap: float = 0.0,
        out_offset: int = 0,
        per_seq: bool = False,
        exact: bool = False,
    ) -> None:
        """out[:, out_offset:] = epilogue(x @ weight.T), or += with residual. act: gate rows, then up rows.

        `exact`: all in float32, where choices hang on the result.
        """
        m = self.n_seqs if per_seq else self.n_rows
        for shard in weight.shards:
            n = shard.n_rows // 2 if act else shard.n_rows
            consts = {
                "fmt": weight.fmt.name, "k": weight.k, "n": n, "act": act, "bias": bias is not None,
                "residual": residual, "scale": scale, "softcap": softcap, "out_stride": out.shape[-1],
                "out_offset": out_offset + shard.first_row,
                "st": self.layout,
            }  # fmt: skip
            views = [self.step, x, *shard.parts, *([bias] if bias else []), out]
            if m > MATVEC_ROWS and not self.device.info.is_cpu and not per_seq:
                bm = 32 if m <= 32 else 64
                f16 = "f16" in self.device.features and not exact
                kernel = self.device.kernel("matmul", **consts, bm=bm, f16=f16)
                grid = (-(-n // (32 if act else 64)), -(-m // bm))
            else:
                tuning = choose_matvec(self.device, n, weight.k, m)
                grid, fold = tuning.grid(self.device, n, m)
                kernel = self.device.kernel(
                    "matvec", **consts, per_seq=per_seq, lanes=tuning.lanes, rows=tuning.rows, wg=tuning.wg,
                    m_tile=tuning.m_tile, subgroup=tuning.subgroup, grid_x=fold,
                )  # fmt: skip
            self._add(kernel, views, grid, f"{kernel.name} {weight.label}")

    def route(self, logits: Tensor, routes: Tensor, *, renormalise: bool) -> None:
        """The best experts of each row and their weights: routes (n_rows, n_used, 2)."""
        n_experts = logits.shape[-1]
        kernel = self.device.kernel(
            "moe_route", n_experts=n_experts, n_used=routes.shape[1], renormalise=renormalise,
            wg=32 if n_experts <= 32 else 128, st=self.layout,
        )  # fmt: skip
        self._add(kernel, (self.step, logits, routes), (self.n_rows,))

    def experts(
        self,
        x: Tensor,
        weight: Weight,
        routes: Tensor,
        out: Tensor,
        *,
        bias: Tensor | None = None,
        act: str = "",
        weighted: bool = False,
        residual: bool = False,
        scale: float = 1.0,
        out_offset: int = 0,
    ) -> None:
        """Products of each row of x with its experts: a row of `out` for each of them.

        With `weighted` x has a row for each of them, and out their weighted sum. An expert has
        `weight.unit` rows.
        """
        n_used, halves = routes.shape[1], 2 if act else 1
        n = weight.unit // halves
        for i, shard in enumerate(weight.shards):
            consts = {
                "fmt": weight.fmt.name, "k": weight.k, "n": n, "act": act, "bias": bias is not None,
                "weighted": weighted, "residual": residual or (weighted and i > 0), "scale": scale,
                "n_used": n_used, "n_experts": weight.n // weight.unit,
                "first_expert": shard.first_row // weight.unit, "n_here": shard.n_rows // weight.unit,
                "out_stride": out.shape[-1], "out_offset": out_offset, "st": self.layout,
            }  # fmt: skip
            tuning = choose_experts(self.device)
            grid, fold = tuning.grid(self.device, n, self.n_rows * (1 if weighted else n_used))
            kernel = self.device.kernel(
                "moe_matvec", **consts, lanes=tuning.lanes, rows=tuning.rows, wg=tuning.wg,
                subgroup=tuning.subgroup, grid_x=fold,
            )  # fmt: skip
            views = (self.step, x, routes, *shard.parts, *([bias] if bias else []), out)
            self._add(kernel, views, grid, f"{kernel.name} {weight.label}")

    def gated(self, x: Tensor, out: Tensor, act: str) -> None:
        """out = act(gate) * up, where x holds gate and up side by side."""
        n, dim = out.shape
        kernel = self.device.kernel("gated", act=act, dim=dim, times=n // self.n_rows, st=self.layout)
        self._add(kernel, (self.step, x, out), (-(-n * dim // 256),))

    def qk_norm(
        self, qkv: Tensor, q_weight: Tensor, k_weight: Tensor, n_q: int, n_k: int, eps: float
    ) -> None:  # fmt: skip
        """Norm n_q slices of q and n_k of k in place; the weights say how long a slice is."""
        kernel = self.device.kernel(
            "qk_norm", n_q=n_q, len_q=q_weight.shape[0], n_k=n_k, len_k=k_weight.shape[0],
            stride=qkv.shape[-1],
            eps=eps, wg=64, subgroup=self.device.subgroup_size, st=self.layout,
        )  # fmt: skip
        self._add(kernel, (self.step, qkv, q_weight, k_weight), (n_q + n_k, self.n_rows))

    def rope_store(self, qkv: Tensor, rope: Rope, q: Tensor, pages: Pages, *, n_heads: int) -> None:
        """Rotate q and k; q goes to its own tensor, k and v into the pages."""
        n_kv, block_size, head_dim = pages.k.shape[1:]
        kernel = self.device.kernel(
            "rope_store", n_heads=n_heads, n_kv=n_kv, head_dim=head_dim, rot_dim=rope.dim, neox=rope.neox,
            magnitude=rope.magnitude, block_size=block_size, kv=pages.k.dtype, ring=pages.ring,
            st=self.layout,
        )  # fmt: skip
        threads = (n_heads + 2 * n_kv) * head_dim // 2
        self._add(kernel, (self.step, qkv, rope.turns, q, pages.k, pages.v), (-(-threads // 64), self.n_rows))

    def attention(
        self,
        q: Tensor,
        pages: Pages,
        out: Tensor,
        *,
        n_heads: int,
        scale: float,
        window: int = 0,
        softcap: float = 0.0,
        sinks: Tensor | None = None,
    ) -> None:
        """Causal attention of every row over what its sequence has in the pages, or its last `window`."""
        n_kv, block_size, head_dim = pages.k.shape[1:]
        parts, extra = out, () if sinks is None else (sinks,)
        if self.splits > 1:
            parts = self.scratch("attention parts", self.n_rows, n_heads, self.splits, head_dim + 2)
        kernel = self.device.kernel(
            "attention", n_heads=n_heads, n_kv=n_kv, head_dim=head_dim, block_size=block_size, scale=scale,
            softcap=softcap, window=window, kv=pages.k.dtype, ring=pages.ring,
            sinks=bool(extra) and self.splits == 1, qt=self.qt,
            splits=self.splits, wg=64, subgroup=self.device.subgroup_size, st=self.layout,
        )  # fmt: skip
        tiles = max_tiles(self.n_rows, self.n_seqs, self.qt)
        views = (self.step, q, pages.k, pages.v, *(extra if self.splits == 1 else ()), parts)
        self._add(kernel, views, (tiles, n_kv, self.splits))
        if self.splits > 1:
            merge = self.device.kernel(
                "attention_merge", n_heads=n_heads, head_dim=head_dim, splits=self.splits, sinks=bool(extra),
                st=self.layout,
            )  # fmt: skip
            self._add(merge, (self.step, parts, *extra, out), (n_heads, self.n_rows))

    def short_conv(self, bcx: Tensor, weight: Tensor, state: State, out: Tensor) -> None:
        """out = c * conv(b * x) by channel, over the state and this step's rows; moves the state on."""
        dim, l_cache = weight.shape
        consts = {"dim": dim, "l_cache": l_cache, "stride": state.stride, "st": self.layout}
        kernel = self.device.kernel("short_conv", **consts)
        self._add(kernel, (self.step, bcx, weight, state.values, out), (-(-dim // 256), self.n_rows))

    def adjust_logits(self, logits: Tensor, bias: Tensor, counts: Tensor) -> None:
        n_vocab = logits.shape[-1]
        kernel = self.device.kernel("adjust_logits", n_vocab=n_vocab, st=self.layout)
        self._add(kernel, (self.step, bias, counts, logits), (-(-n_vocab // 64), self.n_seqs))

    def sample(self, logits: Tensor, out: Tensor, *, draw: bool, counts: Tensor | None) -> None:
        """Token ids of the sequences into `out` and the slots. Without `draw` all of them must be greedy."""
        n_vocab = logits.shape[-1]
        wg = 64 if self.device.info.is_cpu else 256
        parts = 8 if self.device.info.is_cpu else SAMPLE_PARTS
        best = self.scratch("best", self.n_seqs, parts, 2)
        drawn = self.scratch("drawn", self.n_seqs)
        consts = {"n_vocab": n_vocab, "parts": parts, "st": self.layout}
        partial = self.device.kernel("sample_partial", **consts, wg=wg)
        self._add(partial, (self.step, logits, best), (parts, self.n_seqs))
        if draw:
            kernel = self.device.kernel("sample_draw", **consts, wg=wg)
            self._add(kernel, (self.step, logits, best, drawn), (self.n_seqs,))
        final = self.device.kernel("sample_final", **consts, counting=counts is not None)
        extra = () if counts is None else (counts,)
        self._add(final, (self.step, best, drawn, self.slots, out, *extra), (1,))

    def _add(self, kernel, views, grid, label: str = "") -> None:
        self.program.add(kernel, views, grid, label)


def max_tiles(n_rows: int, n_seqs: int, qt: int) -> int:
    """The most attention tiles that n_rows rows of n_seqs sequences can be cut into."""
    return n_rows if qt == 1 else min(n_rows, -(-n_rows // qt) + n_seqs - 1)
