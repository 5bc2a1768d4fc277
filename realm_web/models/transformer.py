"""The decoder block that the architectures share: weights from a GGUF file, and one forward pass recorded.

An architecture is a row in `ARCHITECTURES` (models/__init__.py) that says what differs. Knows tensors and the
pages of the KV cache; knows no request.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from realm_web import ops
from realm_web.errors import FormatError, UnsupportedError
from realm_web.gguf import GGUFFile, TensorInfo, show
from realm_web.models.config import LayerKind, ModelConfig
from realm_web.models.experts import ExpertMatrices, Experts
from realm_web.models.shortconv import ShortConv
from realm_web.ops import Activations, HeadNorm, Pages, Recorder, Rope, State
from realm_web.quants import FORMATS, QuantFormat, activation_words
from realm_web.runtime.device import Device, View
from realm_web.tensor import Target, Tensor, Weight, rows_per_shard

LONG_ROPE = {"rope_factors_long.weight", "rope_factors_short.weight"}
ROPE_FACTORS = {"rope_freqs.weight", *LONG_ROPE}
PLAIN_TYPES = ("F32", "F16", "BF16")
OF_MODEL = {"token_embd.weight", "output.weight", *ROPE_FACTORS}
# copies that some files hold in every layer
IGNORED = {"attn_rot_embd.weight", *ROPE_FACTORS}


@dataclass(frozen=True)
class Linear:
    """One or several matrices side by side: (n_0 + n_1 + ..., k). Those of equal format are one weight."""

    weights: tuple[tuple[Weight, int], ...]  # and the first output column of each
    n: int
    bias: Tensor | None

    def record(self, r: Recorder, x: Tensor | Activations, out: Tensor, **options) -> None:
        x = Activations.of(x)
        if len(self.weights) == 2 and not options:
            (first, _), (second, _) = self.weights
            if ops.goes_with(r, x, first, second):
                ops.linear(r, x, first, out, bias=self.bias, second=second)
                return
        for weight, offset in self.weights:
            ops.linear(r, x, weight, out, bias=self.bias, out_offset=offset, **options)

    def form(self, r: Recorder) -> str:
        """As what the rows of a pass are taken, if all weights agree."""
        forms = {ops.form_of(r, weight) for weight, _ in self.weights}
        return forms.pop() if len(forms) == 1 else ""


@dataclass(frozen=True)
class Attention:
    qkv: Linear
    qk_norm: tuple[Tensor, Tensor] | None
    sinks: Tensor | None
    output: Linear

    @property
    def input(self) -> Linear:
        return self.qkv


@dataclass(frozen=True)
class FeedForward:
    gate_up: Linear
    fused_act: bool  # gate and up are one weight and have no bias: the product itself applies act(gate) * up
    down: Linear

    @property
    def input(self) -> Linear:
        return self.gate_up

    def record(self, r: Recorder, x: Activations, out: Tensor, *, act: str, **options) -> None:
        n, k = r.n_rows, self.gate_up.n // 2
        if self.fused_act and self._takes_bytes(r, act):
            rows = r.scratch("hidden in bytes", n, activation_words(k))
            self.gate_up.record(r, x, rows, act=act, to_bytes=True)
            self.down.record(r, Activations.made(rows, n, k), out, **options)
            return
        hidden = Activations(r.scratch("hidden", n, k), name="hidden", form=self.down.form(r), only=True)
        if self.fused_act:
            self.gate_up.record(r, x, hidden.x, act=act, then=hidden)
        else:
            both = r.scratch("gate and up", r.n_rows, self.gate_up.n)
            self.gate_up.record(r, x, both)
            ops.gated(r, both, hidden.x, act)
        self.down.record(r, hidden, out, **options)

    def _takes_bytes(self, r: Recorder, act: str) -> bool:
        (gate_up, _), *_ = self.gate_up.weights
        return self.down.form(r) == "bytes" and ops.makes_bytes(r, gate_up, act)


@dataclass(frozen=True)
class Layer:
    attn_norm: Tensor | None
    mixer: Attention | ShortConv
    attn_post_norm: Tensor | None
    ffn_norm: Tensor | None
    ffn: FeedForward | Experts
    ffn_post_norm: Tensor | None


class Transformer:
    """The weights on the device (allocated here, filled by the loader through `targets`) and `record`."""

    def __init__(self, config: ModelConfig, gguf: GGUFFile, device: Device):
        self.config = config
        self.targets: dict[str, Target] = {}
        self._gguf, self._device = gguf, device
        c = config
        self.token_embd = self._matrix("token_embd.weight", c.n_vocab, c.dim)
        self.layers = [self._layer(i) for i in range(c.n_layers)]
        self.output_norm = self._vector(final_norm(c, gguf), c.dim)
        tied = "output.weight" not in gguf.tensors
        self.output = self.token_embd if tied else self._matrix("output.weight", c.n_vocab, c.dim)

    @property
    def weight_bytes(self) -> int:
        """Bytes of weights on the device."""
        return sum({id(t.to): t.to.nbytes for t in self.targets.values()}.values())

    @property
    def bytes_per_token(self) -> int:
        """Bytes of weights that a decode step reads: all but the embedding, unless it is the output too.

        Of the experts those that one token has.
        """
        read = {id(t.to): t.to.nbytes for t in self.targets.values()}
        if self.output is not self.token_embd:
            del read[id(self.token_embd)]
        for layer in self.layers:
            if isinstance(layer.ffn, Experts):
                experts = layer.ffn.config
                for weight in (matrices.weight for matrices in layer.ffn.matrices):
                    read[id(weight)] = weight.nbytes * experts.n_used // experts.n_experts
        return sum(read.values())

    @property
    def matrices(self) -> list[tuple[Weight, str, str]]:
        """Every weight that a pass multiplies with, the activation that goes with it or "", and its input.

        That is "norm", "plain" (float32), or "bytes" that are made already.
        """
        before = "plain" if self.config.arch.norms == "post" else "norm"
        found = [(self.output, "", "bytes")]
        for layer in self.layers:
            mixer, ffn = layer.mixer, layer.ffn
            first = mixer.in_proj if isinstance(mixer, ShortConv) else mixer.qkv
            k = mixer.output.weights[0][0].k
            attends = isinstance(mixer, Attention)
            made = attends and ops.attends_to_bytes(self._device, 1, k, self.config.head_dim)
            linears = [(first, "", before), (mixer.output, "", "bytes" if made else "plain")]
            if isinstance(ffn, FeedForward):
                linears.append((ffn.gate_up, self.config.arch.act if ffn.fused_act else "", before))
                linears.append((ffn.down, "", "bytes" if ffn.fused_act else "plain"))
            found += [(weight, act, x) for linear, act, x in linears for weight, _ in linear.weights]
        return found

    def record(self, r: Recorder, memory: list[Pages | State], ropes: list[Rope]) -> Tensor:
        """Record the pass; returns the logits (n_seqs, n_vocab) of the rows from which tokens are drawn."""
        return self.record_logits(r, self.record_hidden(r, memory, ropes))

    def record_hidden(self, r: Recorder, memory: list[Pages | State], ropes: list[Rope]) -> Tensor:
        """Record all layers; returns the hidden states (n_rows, dim), before the final norm.

        `memory` is what each layer keeps of the sequences: pages of attention, states of short convolutions.
        `ropes` holds one for each of config.ropes, and last the one that does not rotate.
        """
        c = self.config
        x = r.scratch("x", r.n_rows, c.dim)
        ops.embed(r, self.token_embd, x, c.embedding_scale)
        normed = None
        for i, (layer, kind, kept) in enumerate(zip(self.layers, c.layers, memory, strict=True)):
            normed = normed or self._normed(r, layer.attn_norm, x, layer.mixer)
            if isinstance(layer.mixer, ShortConv):
                mixed = layer.mixer.record(r, normed, kept)
            else:
                mixed = self._record_attention(r, layer.mixer, kind, normed, kept, ropes[kind.rope])
            normed = self._normed(r, layer.ffn_norm, x, layer.ffn)
            self._add(r, partial(layer.mixer.output.record, r, mixed), layer.attn_post_norm, x, normed)
            record = partial(layer.ffn.record, r, normed, act=c.arch.act)
            after = self.layers[i + 1] if i + 1 < c.n_layers else None
            normed = self._normed(r, after.attn_norm, x, after.mixer) if after else None
            self._add(r, record, layer.ffn_post_norm, x, normed)
        return x

    def record_logits(self, r: Recorder, x: Tensor) -> Tensor:
        """The logits (n_seqs, n_vocab) of the rows of x (n_rows, dim) from which tokens are drawn."""
        c = self.config
        last = Activations(x, self.output_norm, c.norm_eps, name="last", gather=True)
        logits = r.scratch("logits", r.n_seqs, c.n_vocab)
        ops.linear(r, last, self.output, logits, per_seq=True, scale=c.logit_scale, softcap=c.logit_softcap)
        return logits

    def record_scores(self, r: Recorder, x: Tensor, out: View, *, n_valid: int) -> None:
        """out (n_rows,) f32: the log-probability of each row's target, among the first n_valid tokens."""
        c = self.config
        ops.row_scores(
            r, x, self.output_norm, self.output, out, eps=c.norm_eps, scale=c.logit_scale,
            softcap=c.logit_softcap, n_valid=n_valid,
        )  # fmt: skip

    def record_pool(self, r: Recorder, x: Tensor, kept: Tensor, out: View) -> None:
        """out (n_seqs, dim) f32: the sequences' rows of x, normed and pooled; `kept` as in `ops.pool`."""
        ops.pool(r, x, self.output_norm, kept, out, eps=self.config.norm_eps)

    def _record_attention(
        self, r: Recorder, attention: Attention, kind: LayerKind, x: Activations, pages: Pages, rope: Rope
    ) -> Activations:  # fmt: skip
        c, n_heads = self.config, kind.n_heads
        qkv = r.scratch("qkv", r.n_rows, attention.qkv.n)
        attention.qkv.record(r, x, qkv)
        norm = None
        if attention.qk_norm and c.arch.qk_norm == "head":
            norm = HeadNorm(*attention.qk_norm, c.norm_eps)
        elif attention.qk_norm:
            ops.qk_norm(r, qkv, *attention.qk_norm, c.norm_eps)
        n, k = r.n_rows, n_heads * c.head_dim
        to_bytes = r.qt == 1 and attention.output.form(r) == "bytes"
        to_bytes = to_bytes and ops.attends_to_bytes(r.device, n, k, c.head_dim)
        out = r.scratch("attended", n, activation_words(k) if to_bytes else k)
        ops.attention(
            r, qkv, rope, pages, out, n_heads=n_heads, scale=c.attention_scale, norm=norm, window=kind.window,
            softcap=c.attention_softcap, sinks=attention.sinks, to_bytes=to_bytes,
        )  # fmt: skip
        return Activations.made(out, n, k) if to_bytes else Activations(out, name="attended")

    def _normed(
        self, r: Recorder, weight: Tensor | None, x: Tensor,
        part: Attention | ShortConv | FeedForward | Experts,
    ) -> Activations:  # fmt: skip
        """What this part of a layer makes of x."""
        form = part.input.form(r) if part.input else ""
        return Activations(x, weight, self.config.norm_eps, name="normed", form=form)

    def _add(
        self, r: Recorder, record: Callable[..., None], post_norm: Tensor | None, x: Tensor,
        then: Activations | None,
    ) -> None:  # fmt: skip
        """x += scale * what `record` records, normed first where there is a post norm.

        `then`: what is to be made of x next.
        """
        c = self.config
        if post_norm is None:
            record(x, residual=True, scale=c.residual_scale, then=then)
            return
        added = r.scratch("added", *x.shape)
        record(added, residual=False, scale=c.residual_scale)
        made = None
        # one row is normed by the product itself, which then takes two formats in one call
        if r.n_rows > 1 and then is not None and then.form == "bytes" and then.may_be_made(r.device):
            made = then.norm, *then.to_fill(r)
        ops.rmsnorm(r, added, post_norm, x, c.norm_eps, residual=True, then=made)

    def _layer(self, i: int) -> Layer:
        c, at = self.config, f"blk.{i}."
        pre, post = c.arch.norms in ("pre", "both"), c.arch.norms in ("post", "both")
        return Layer(
            attn_norm=self._vector(at + "attn_norm.weight", c.dim) if pre else None,
            mixer=self._attention(at, c.layers[i]) if c.layers[i].n_kv_heads else self._short_conv(at),
            attn_post_norm=self._vector(at + "post_attention_norm.weight", c.dim) if post else None,
            ffn_norm=self._vector(f"{at}{c.arch.ffn_norm}.weight", c.dim) if pre else None,
            ffn=self._experts(at) if c.experts else self._feed_forward(at),
            ffn_post_norm=self._vector(at + "post_ffw_norm.weight", c.dim) if post else None,
        )

    def _attention(self, at: str, kind: LayerKind) -> Attention:
        c = self.config
        heads, kv = kind.n_heads * c.head_dim, kind.n_kv_heads * c.head_dim
        qkv = {"attn_qkv": heads + 2 * kv} if c.arch.fused else {"attn_q": heads, "attn_k": kv, "attn_v": kv}
        lengths = {"": None, "head": (c.head_dim, c.head_dim), "all": (heads, kv)}[c.arch.qk_norm]
        return Attention(
            qkv=self._linear(at, qkv, c.dim),
            qk_norm=lengths
            and (
                self._vector(at + "attn_q_norm.weight", lengths[0]),
                self._vector(at + "attn_k_norm.weight", lengths[1]),
            ),
            sinks=self._vector(at + "attn_sinks.weight", kind.n_heads) if c.arch.sinks else None,
            output=self._linear(at, {"attn_output": c.dim}, heads),
        )

    def _short_conv(self, at: str) -> ShortConv:
        c = self.config
        return ShortConv(
            in_proj=self._linear(at, {"shortconv.in_proj": 3 * c.dim}, c.dim),
            conv=self._small(at + "shortconv.conv.weight", (c.dim, c.l_cache)),
            output=self._linear(at, {"shortconv.out_proj": c.dim}, c.dim),
        )

    def _experts(self, at: str) -> Experts:
        c, e = self.config, self.config.experts
        names = ("ffn_gate_exps", "ffn_up_exps")
        shape = (c.dim, e.ffn_dim, e.n_experts)
        alike = len({self._gguf.tensor(f"{at}{name}.weight", shape).ggml_type for name in names}) == 1
        return Experts(
            config=e,
            router=self._linear(at, {"ffn_gate_inp": e.n_experts}, c.dim),
            gate_up=tuple(
                self._expert_matrices(at, group, e.ffn_dim, c.dim)
                for group in ([names] if alike else [names[:1], names[1:]])
            ),
            down=self._expert_matrices(at, ("ffn_down_exps",), c.dim, e.ffn_dim),
        )

    def _expert_matrices(self, at: str, names: tuple[str, ...], n: int, k: int) -> ExpertMatrices:
        """A matrix of n rows for each name and expert; those of an expert are next to each other."""
        n_experts, rows = self.config.experts.n_experts, n * len(names)
        fmt = self._stored(self._gguf.tensor(f"{at}{names[0]}.weight", (k, n, n_experts)).format)
        weight = Weight.alloc(self._device, fmt, n_experts * rows, k, at + "+".join(names), unit=rows)
        present = [name for name in names if f"{at}{name}.bias" in self._gguf.tensors]
        bias = Tensor.alloc(self._device, (n_experts, rows), "f32", f"{at}bias") if present else None
        for i, name in enumerate(names):
            self.targets[f"{at}{name}.weight"] = Target(weight, i * n, run=n, every=rows)
            if name in present:
                self._gguf.tensor(f"{at}{name}.bias", (n, n_experts))
                self.targets[f"{at}{name}.bias"] = Target(bias, i * n, run=n, every=rows)
        return ExpertMatrices(weight, bias)

    def _feed_forward(self, at: str) -> FeedForward:
        c = self.config
        gate_up, fused_act = self._gate_up(at)
        return FeedForward(gate_up, fused_act, down=self._linear(at, {"ffn_down": c.dim}, c.ffn_dim))

    def _gate_up(self, at: str) -> tuple[Linear, bool]:
        c = self.config
        names = {"ffn_up": 2 * c.ffn_dim} if c.arch.fused else {"ffn_gate": c.ffn_dim, "ffn_up": c.ffn_dim}
        formats = {self._info(f"{at}{name}.weight", n, c.dim).format for name, n in names.items()}
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
                check_plain(self._gguf.tensor(f"{at}{name}.bias", (n,)))
                self.targets[f"{at}{name}.bias"] = Target(bias, first)
            first += n
        return bias

    def _matrix(self, name: str, n: int, k: int) -> Weight:
        weight = Weight.alloc(self._device, self._stored(self._info(name, n, k).format), n, k, name)
        self.targets[name] = Target(weight, 0)
        return weight

    def _vector(self, name: str, n: int) -> Tensor:
        return self._small(name, (n,))

    def _small(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """A tensor that is kept in float32."""
        check_plain(self._gguf.tensor(name, shape[::-1]))
        tensor = Tensor.alloc(self._device, shape, "f32", name)
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
    check_rope_factors(config, gguf)
    layers = {str(i): kind for i, kind in enumerate(config.layers)}
    for name in gguf.tensors:
        head, _, rest = name.partition(".")
        layer, _, part = rest.partition(".")
        if name in OF_MODEL or part in IGNORED or name == final_norm(config, gguf):
            continue
        if head == "blk" and layer not in layers:
            raise FormatError(f"tensor {show(name)} is of a layer beyond block_count {config.n_layers}")
        if head != "blk" or not _has_tensor(config, layers[layer], part):
            raise UnsupportedError(
                f"tensor {show(name)} is not one that the {config.architecture} architecture has here"
            )


def check_plain(info: TensorInfo) -> None:
    """Norms, biases and factors are read as numbers, not decoded."""
    if info.type_name not in PLAIN_TYPES:
        raise UnsupportedError(
            f"tensor {info.name!r} is a vector of type {info.type_name}; supported are F32, F16 and BF16"
        )


def check_rope_factors(config: ModelConfig, gguf: GGUFFile) -> None:
    """One for each pair that turns. LongRoPE has two sets; one is for contexts beyond the first training."""
    wanted = {name for name in ROPE_FACTORS if name in gguf.tensors}
    if LONG_ROPE & wanted or config.ropes[0].scaling.kind == "longrope":
        wanted |= LONG_ROPE
    for name in sorted(wanted):
        check_plain(gguf.tensor(name, (config.rope_dim // 2,)))


def final_norm(config: ModelConfig, gguf: GGUFFile) -> str:
    """The name of the norm before the output: the architecture's, or the usual one of some converters."""
    usual = "output_norm.weight"
    return usual if usual in gguf.tensors else f"{config.arch.final_norm}.weight"


def _has_tensor(config: ModelConfig, kind: LayerKind, part: str) -> bool:
    stem, _, role = part.rpartition(".")
    biased = role == "bias" and not stem.endswith(("norm", ".conv", "sinks"))
    return (role == "weight" or biased) and stem in _layer_tensors(config, kind)


def _layer_tensors(config: ModelConfig, kind: LayerKind) -> set[str]:
    arch = config.arch
    names = {"ffn_up", "ffn_down"} | (set() if arch.fused else {"ffn_gate"})
    if arch.experts:
        names = {"ffn_gate_inp", "ffn_gate_exps", "ffn_up_exps", "ffn_down_exps"}
    if kind.n_kv_heads:
        names |= {"attn_output"} | ({"attn_qkv"} if arch.fused else {"attn_q", "attn_k", "attn_v"})
        names |= {"attn_q_norm", "attn_k_norm"} if arch.qk_norm else set()
        names |= {"attn_sinks"} if arch.sinks else set()
    else:
        names |= {"shortconv.in_proj", "shortconv.conv", "shortconv.out_proj"}
    names |= {"attn_norm", arch.ffn_norm} if arch.norms != "post" else set()
    return names | ({"post_attention_norm", "post_ffw_norm"} if arch.norms != "pre" else set())
