"""A mixture of experts as the feed-forward block (Shazeer et al., "Outrageously Large Neural Networks").

A router picks a few experts for each token; each is a gated feed-forward block, and their outputs are summed
by the router's weights. All of it runs on the device: the host never learns which experts were chosen, and of
the others no weight is read. Knows kernels by `ops`; knows no file.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from realm_web import ops
from realm_web.models.config import ExpertsConfig
from realm_web.ops import Activations, Recorder
from realm_web.tensor import Tensor, Weight

if TYPE_CHECKING:
    from realm_web.models.transformer import Linear


@dataclass(frozen=True)
class ExpertMatrices:
    """One or two matrices of every expert, the rows of an expert together: (n_experts * rows, k)."""

    weight: Weight
    bias: Tensor | None  # (n_experts, rows)


@dataclass(frozen=True)
class Experts:
    config: ExpertsConfig
    router: Linear
    gate_up: tuple[ExpertMatrices, ...]  # one of both, or where their formats differ one of each
    down: ExpertMatrices

    @property
    def input(self) -> Linear | None:
        """None: the router takes floats."""
        return None

    def record(
        self, r: Recorder, x: Activations, out: Tensor, *, act: str, residual: bool, scale: float,
        then: Activations | None = None,
    ) -> None:  # fmt: skip
        """out = scale * what the chosen experts make of each row, weighted and summed; += with residual.

        `then`, the activations to be made of out, is left for who takes them.
        """
        c, down = self.config, self.down
        logits = r.scratch("router", r.n_rows, c.n_experts)
        routes = r.scratch("routes", r.n_rows, c.n_used, 2)
        hidden = r.scratch("hidden of experts", r.n_rows * c.n_used, c.ffn_dim)
        self.router.record(r, x, logits, exact=True)
        ops.route(r, logits, routes, renormalise=c.renormalise)
        if len(self.gate_up) == 1:
            (both,) = self.gate_up
            ops.experts(r, x, both.weight, routes, hidden, bias=both.bias, act=act)
        else:
            apart = r.scratch("gate and up of experts", r.n_rows * c.n_used, 2 * c.ffn_dim)
            for i, part in enumerate(self.gate_up):
                ops.experts(r, x, part.weight, routes, apart, bias=part.bias, out_offset=i * c.ffn_dim)
            ops.gated(r, apart, hidden, act)
        ops.experts(
            r, hidden, down.weight, routes, out, bias=down.bias, weighted=True, residual=residual,
            scale=scale * c.scale,
        )  # fmt: skip

    @property
    def matrices(self) -> tuple[ExpertMatrices, ...]:
        return *self.gate_up, self.down
