"""The gated short convolution of LFM2, in place of attention; its state is the sequence's last few values.

b, c, x = in_proj(input); output = out_proj(c * conv(b * x)); conv is causal and of each channel by itself.
Knows slots; knows neither requests nor what the other layers keep.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from realm_web import ops
from realm_web.ops import Activations, Recorder, State
from realm_web.runtime.device import Device
from realm_web.tensor import PART_ALIGNMENT, Tensor

if TYPE_CHECKING:
    from realm_web.models.transformer import Linear


@dataclass(frozen=True)
class ShortConv:
    """The weights of one layer; `record` leaves `output` to the block, which adds it to the residual."""

    in_proj: Linear
    conv: Tensor  # (dim, l_cache)
    output: Linear

    @property
    def input(self) -> Linear:
        return self.in_proj

    def record(self, r: Recorder, x: Activations, state: State) -> Tensor:
        dim = self.conv.shape[0]
        bcx = r.scratch("bcx", r.n_rows, 3 * dim)
        out = r.scratch("convolved", r.n_rows, dim)
        self.in_proj.record(r, x, bcx)
        ops.short_conv(r, bcx, self.conv, state, out)
        return out


class States:
    """The states of all layers, (max_seqs, n_layers, length, dim) f32: those of a slot are in one piece."""

    def __init__(self, device: Device, *, max_seqs: int, n_layers: int, length: int, dim: int):
        self._device, self._length, self._max_seqs = device, length, max_seqs
        self._layer_bytes = -(-4 * length * dim // PART_ALIGNMENT) * PART_ALIGNMENT
        self.slot_bytes = n_layers * self._layer_bytes
        self._buffer = device.alloc(max_seqs * self.slot_bytes, "states of the short convolutions")

    def layer(self, index: int) -> State:
        """Of the index-th layer that is a short convolution."""
        view = self._device.view(self._buffer, index * self._layer_bytes)
        return State(view, self._length, self.slot_bytes // 4)

    async def read(self, slot: int) -> bytes:
        self._check(slot)
        return await self._device.read(self._buffer, slot * self.slot_bytes, self.slot_bytes)

    def write(self, slot: int, data: bytes) -> None:
        self._check(slot)
        if len(data) != self.slot_bytes:
            raise ValueError(f"a state of {len(data)} bytes; this model's are of {self.slot_bytes}")
        self._device.write(self._buffer, data, slot * self.slot_bytes)

    def _check(self, slot: int) -> None:
        if not 0 <= slot < self._max_seqs:
            raise ValueError(f"slot {slot} is not one of 0 to {self._max_seqs - 1}")
