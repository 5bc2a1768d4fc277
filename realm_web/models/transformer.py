"""The decoder block that the architectures share: weights from a GGUF file, and one forward pass recorded.

An architecture is a row in `ARCHITECTURES` (models/__init__.py) that says what differs. Knows tensors and the
pages of the KV cache; knows no request.
"""

from __future__ import annotations

from dataclasses import dataclass

from realm_web.errors import FormatError, UnsupportedError
from realm_web.gguf import GGUFFile, TensorInfo
from realm_web.models.config import ModelConfig
from realm_web.ops import Recorder
from realm_web.quants import FORMATS, QuantFormat
from realm_web.runtime.device import Device
from realm_web.tensor import Tensor, Weight, rows_per_shard

BIAS_OK = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")


@dataclass(frozen=True)
class Target:
    """Where a tensor of the file goes: rows of a weight from `first` on, or elements of a vector."""

    to: Weight | Tensor
    first: int


@dataclass(frozen=True)
class Linear:
    """One or several matrices side by side: (n_0 + n_1 + ..., k). Those of equal format are one weight."""

    weights: tuple[tuple[Weight, int], ...]  # and the first output column of each
    n: int
    bias: Tensor | None

    def record(self, r: Recorder, x: Tensor, out: Tensor, **options) -> None:
        for weight, offset in self.weights:
            r.linear(x, weight, out, bias=self.bias, out_offset=offset, **options)


@dataclass(frozen=True)
class Layer:
    attn_norm: Tensor
    qkv: Linear
    attn_output: Linear
    ffn_norm: Tensor
    gate_up: Linear
    fused_act: bool  # gate and up are one weight and have no bias: the product applies silu(gate) * up itself
    ffn_down: Linear


class Transformer:
    """The weights on the device (allocated here, filled by the loader through `targets`) and `record`."""

    def __init__(self, config: ModelConfig, gguf: GGUFFile, device: Device):
        self.config = config
        self.targets: dict[str, Target] = {}
        self._gguf, self._device = gguf, device
        c = config
        self.token_embd = self._matrix("token_embd.weight", c.n_vocab, c.dim)
        self.layers = [self._layer(i) for i in range(c.n_layers)]
        self.output_norm = self._vector("output_norm.weight", c.dim)
        tied = "output.weight" not in gguf.tensors
        self.output = self.token_embd if tied else self._matrix("output.weight", c.n_vocab, c.dim)

    @property
    def weight_bytes(self) -> int:
        """Bytes of weights on the device."""
        return sum({id(t.to): t.to.nbytes for t in self.targets.values()}.values())

    @property
    def bytes_per_token(self) -> int:
        """Bytes of weights that a decode step reads: all but the embedding, unless it is the output too."""
        read = {id(t.to): t.to.nbytes for t in self.targets.values()}
        if self.output is not self.token_embd:
            del read[id(self.token_embd)]
        return sum(read.values())

    def record(
        self, r: Recorder, pages: list[tuple[Tensor, Tensor]], turns: Tensor, magnitude: float
    ) -> Tensor:
        """Record the pass; returns the logits (n_seqs, n_vocab) of the rows from which tokens are drawn."""
        c = self.config
        x = r.scratch("x", r.n_rows, c.dim)
        normed = r.scratch("normed", r.n_rows, c.dim)
        qkv = r.scratch("qkv", r.n_rows, (c.n_heads + 2 * c.n_kv_heads) * c.head_dim)
        q = r.scratch("q", r.n_rows, c.n_heads * c.head_dim)
        attended = r.scratch("attended", r.n_rows, c.n_heads * c.head_dim)
        hidden = r.scratch("hidden", r.n_rows, c.ffn_dim)
        r.embed(self.token_embd, x)
        for layer, (keys, values) in zip(self.layers, pages, strict=True):
            r.rmsnorm(x, layer.attn_norm, normed, c.norm_eps)
            layer.qkv.record(r, normed, qkv)
            r.rope_store(
                qkv, turns, q, keys, values, n_heads=c.n_heads, rot_dim=c.rope_dim, neox=c.rope_neox,
                magnitude=magnitude,
            )  # fmt: skip
            r.attention(q, keys, values, attended, n_heads=c.n_heads, scale=c.attention_scale)
            layer.attn_output.record(r, attended, x, residual=True)
            r.rmsnorm(x, layer.ffn_norm, normed, c.norm_eps)
            if layer.fused_act:
                layer.gate_up.record(r, normed, hidden, act="silu_mul")
            else:
                both = r.scratch("gate and up", r.n_rows, 2 * c.ffn_dim)
                layer.gate_up.record(r, normed, both)
                r.silu_mul(both, hidden)
            layer.ffn_down.record(r, hidden, x, residual=True)
        last = r.scratch("last", r.n_seqs, c.dim)
        logits = r.scratch("logits", r.n_seqs, c.n_vocab)
        r.rmsnorm(x, self.output_norm, last, c.norm_eps, gather=True)
        r.linear(last, self.output, logits, per_seq=True)
        return logits

    def _layer(self, i: int) -> Layer:
        c, at = self.config, f"blk.{i}."
        heads, kv = c.n_heads * c.head_dim, c.n_kv_heads * c.head_dim
        gate_up, fused = self._gate_up(at)
        return Layer(
            attn_norm=self._vector(at + "attn_norm.weight", c.dim),
            qkv=self._linear(at, {"attn_q": heads, "attn_k": kv, "attn_v": kv}, c.dim),
            attn_output=self._linear(at, {"attn_output": c.dim}, heads),
            ffn_norm=self._vector(at + "ffn_norm.weight", c.dim),
            gate_up=gate_up,
            fused_act=fused,
            ffn_down=self._linear(at, {"ffn_down": c.dim}, c.ffn_dim),
        )

    def _gate_up(self, at: str) -> tuple[Linear, bool]:
        c = self.config
        names = {"ffn_gate": c.ffn_dim, "ffn_up": c.ffn_dim}
        formats = {self._info(f"{at}{name}.weight", c.ffn_dim, c.dim).format for name in names}
        has_bias = any(f"{at}{name}.bias" in self._gguf.tensors for name in names)
        fits = rows_per_shard(self._device, self._stored(formats.copy().pop()), c.dim) >= 2 * c.ffn_dim
        return self._linear(at, names, c.dim), len(formats) == 1 and fits and not has_bias

    def _linear(self, at: str, names: dict[str, int], k: int) -> Linear:
        """Matrices of n rows each, next to each other; neighbours of one format share a weight."""
        runs: list[tuple[QuantFormat, list[tuple[str, int]]]] = []
        for name, n in names.items():
            fmt = self._stored(self._info(f"{at}{name}.weight", n, k).format)
            if not runs or runs[-1][0] is not fmt:
                runs.append((fmt, []))
            runs[-1][1].append((name, n))
        weights, column = [], 0
        for fmt, members in runs:
            label = at + "+".join(name for name, _ in members)
            weight = Weight.alloc(self._device, fmt, sum(n for _, n in members), k, label)
            weights.append((weight, column))
            first = 0
            for name, n in members:
                self.targets[f"{at}{name}.weight"] = Target(weight, first)
                first += n
            column += first
        return Linear(tuple(weights), column, self._biases(at, names))

    def _biases(self, at: str, names: dict[str, int]) -> Tensor | None:
        present = [name for name in names if f"{at}{name}.bias" in self._gguf.tensors]
        if not present:
            return None
        bias = Tensor.alloc(self._device, (sum(names.values()),), "f32", f"{at}bias")
        first = 0
        for name, n in names.items():
            if name in present:
                self._gguf.tensor(f"{at}{name}.bias", (n,))
                self.targets[f"{at}{name}.bias"] = Target(bias, first)
            first += n
        return bias

    def _matrix(self, name: str, n: int, k: int) -> Weight:
        weight = Weight.alloc(self._device, self._stored(self._info(name, n, k).format), n, k, name)
        self.targets[name] = Target(weight, 0)
        return weight

    def _vector(self, name: str, n: int) -> Tensor:
        self._gguf.tensor(name, (n,))
        tensor = Tensor.alloc(self._device, (n,), "f32", name)
        self.targets[name] = Target(tensor, 0)
        return tensor

    def _info(self, name: str, n: int, k: int) -> TensorInfo:
        info = self._gguf.tensor(name, (k, n))
        if k % 32:
            raise UnsupportedError(f"tensor {name}: rows of {k} weights; supported are multiples of 32")
        return info

    def _stored(self, fmt: QuantFormat) -> QuantFormat:
        """The format on the device: the file's own, or float32 where products run on dense weights."""
        return FORMATS["F32"] if "dense" in self._device.features else fmt


def check_tensors(config: ModelConfig, gguf: GGUFFile) -> None:
    """Refuse tensors that the shared block would ignore: the model would run and talk nonsense."""
    known = {"token_embd.weight", "output.weight", "output_norm.weight", "rope_freqs.weight"}
    of_layer = {"attn_norm.weight", "ffn_norm.weight"}
    of_layer |= {f"{name}.{kind}" for name in BIAS_OK for kind in ("weight", "bias")}
    for name in gguf.tensors:
        head, _, rest = name.partition(".")
        layer, _, part = rest.partition(".")
        if name in known or part == "rope_freqs.weight" or part == "attn_rot_embd.weight":
            continue
        if head != "blk" or part not in of_layer:
            raise UnsupportedError(
                f"tensor {name!r} is not one that the {config.architecture} architecture has here"
            )
        if not layer.isdecimal() or int(layer) >= config.n_layers:
            raise FormatError(
                f"tensor {name!r} is of a layer beyond {config.architecture}.block_count {config.n_layers}"
            )
