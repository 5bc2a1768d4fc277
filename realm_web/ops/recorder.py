"""What the operations are recorded with: the program, the shape of the step, and scratch memory by name."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from realm_web.runtime.device import Device, Kernel, Program, View
from realm_web.step import StepLayout
from realm_web.tensor import Tensor


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
    context: int  # tokens of a sequence, at most
    arena: dict[str, Tensor]  # scratch by name, shared by all programs of an engine
    exact: bool | None = None  # activations of products stay float32; None: on software devices only
    alone: bool = False  # no sequence has two rows

    @property
    def ints(self) -> bool:
        """Whether products take activations of 8 bits: of llama.cpp's precision, and twice as fast."""
        return not (self.device.info.is_cpu if self.exact is None else self.exact)

    def scratch(self, name: str, *shape: int) -> Tensor:
        """A float32 scratch tensor; same name, same memory, so a layer's lives until the next one's."""
        size = 1
        for d in shape:
            size *= d
        have = self.arena.get(name)
        if have is None or have.nbytes < 4 * size:
            have = self.arena[name] = Tensor.alloc(self.device, (size,), "f32", f"scratch {name}")
        return Tensor(have.buffer, 0, -(-4 * size // 16) * 16, shape, "f32")

    def add(
        self, kernel: Kernel, views: Sequence[View], grid: Sequence[int], label: str = "",
        *, nbytes: int = 0, flops: int = 0,
    ) -> None:  # fmt: skip
        """One kernel call; `nbytes` it must move and `flops` it computes are for who reads a profile."""
        self.program.add(kernel, views, grid, label, nbytes=nbytes, flops=flops)
