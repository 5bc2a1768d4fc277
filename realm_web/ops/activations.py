"""Activations on their way into products, in the form that a product takes.

As float32, as bytes with a scale for every 32 (`shaders/lib/ints.wgsl`), or as float16 with a scale for each
row (`half_rows.wgsl`); normed first where there is a norm. Each form is recorded when it is first asked for,
once; a product of one row may ask for none, and make its own (`matvec.wgsl`).
"""

from __future__ import annotations

from realm_web.ops.recorder import Recorder
from realm_web.ops.rows import rmsnorm, row_threads
from realm_web.quants import activation_words
from realm_web.runtime.device import Device
from realm_web.tensor import Tensor


class Activations:
    """Rows of x, (n, k), normed with the weights `norm` if there are any.

    `gather`: those of the last norm, from which tokens are drawn, one for each sequence. `name` is of the
    scratch memory. `form`: as what they are taken ("bytes", "halves", "" for neither or unknown), so that
    what makes x may make them at once; with `only` nobody else looks at x, which then need not be there.
    """

    def __init__(
        self, x: Tensor, norm: Tensor | None = None, eps: float = 0.0, *,
        name: str = "", gather: bool = False, form: str = "", only: bool = False,
    ):  # fmt: skip
        self.x, self.norm, self.eps, self.gather, self.form, self.only = x, norm, eps, gather, form, only
        self._name = name or "activations"
        self._floats: Tensor | None = None if norm else x
        self._bytes: Tensor | None = None
        self._halves: tuple[Tensor, Tensor] | None = None

    @classmethod
    def made(cls, rows: Tensor, n: int, k: int) -> Activations:
        """Rows of bytes that a product has made already; there are no floats of them."""
        found = cls(Tensor(rows.buffer, rows.offset, rows.nbytes, (n, k), "bytes"))
        found._floats, found._bytes = None, rows
        return found

    @classmethod
    def of(cls, x: Tensor | Activations) -> Activations:
        return x if isinstance(x, Activations) else cls(x)

    @property
    def are_made(self) -> bool:
        """Whether there are bytes already."""
        return self._bytes is not None

    @property
    def k(self) -> int:
        return self.x.shape[-1]

    def floats(self, r: Recorder) -> Tensor:
        """(n, k) f32."""
        if self._floats is None:
            self._floats = r.scratch(self._name, self._n(r), self.k)
            rmsnorm(r, self.x, self.norm, self._floats, self.eps, gather=self.gather)
        return self._floats

    def bytes(self, r: Recorder) -> Tensor:
        """n rows of `activation_words(k)`."""
        if self._bytes is None:
            self._bytes = self._bytes_of(r)
            if self.norm and self._floats is None:
                rmsnorm(r, self.x, self.norm, self._bytes, self.eps, gather=self.gather, ints=True)
            else:
                self._quantise(r, self.floats(r), self._bytes)
        return self._bytes

    def may_be_made(self, device: Device) -> bool:
        """Whether what makes x can put it in its form: bytes take neighbours that can talk to each other."""
        if not (self.norm or self.only) or self.k % 32:
            return False
        return self.form == "halves" or (self.form == "bytes" and 8 <= device.subgroup_size <= 64)

    def to_fill(self, r: Recorder) -> tuple[Tensor, ...]:
        """Where what makes x is to put them in their form: from then on they are there."""
        if self.only:
            self._floats = None
        if self.form == "halves":
            self._halves = self._halves_of(r)
            return self._halves
        self._bytes = self._bytes_of(r)
        return (self._bytes,)

    def halves(self, r: Recorder) -> tuple[Tensor, Tensor]:
        """(k / 8, n, 8) f16 and the scales (n,) f32 of its rows, for matrix units."""
        if self._halves is None:
            n, (y, scale) = self._n(r), self._halves_of(r)
            norm = self.norm is not None and self._floats is None
            kernel = r.device.kernel(
                "half_rows", k=self.k, rows=n, norm=norm, eps=self.eps if norm else 0.0,
                gather=norm and self.gather, per_seq=self.gather, wg=row_threads(r.device, self.k),
                subgroup=r.device.subgroup_size, st=r.layout,
            )  # fmt: skip
            rows = (self.x, self.norm) if norm else (self.floats(r),)
            r.add(kernel, (r.step, *rows, y, scale), (n,), f"half_rows {self._name}")
            self._halves = y, scale
        return self._halves

    def _bytes_of(self, r: Recorder) -> Tensor:
        return r.scratch(f"{self._name} in bytes", self._n(r), activation_words(self.k))

    def _halves_of(self, r: Recorder) -> tuple[Tensor, Tensor]:
        n = self._n(r)
        y = r.scratch(f"{self._name} in halves", n, self.k // 2)
        return y, r.scratch(f"scales of {self._name}", n)

    def _n(self, r: Recorder) -> int:
        return r.n_seqs if self.gather else self.x.shape[0]

    def _quantise(self, r: Recorder, x: Tensor, out: Tensor) -> None:
        n = self._n(r)
        subgroup = r.device.subgroup_size if r.device.subgroup_size <= 64 else 0
        wg, each = (256, 4) if subgroup >= 8 else (64, 32)  # threads, values of a thread
        kernel = r.device.kernel(
            "quantise", k=self.k, times=1 if self.gather else n // r.n_rows, per_seq=self.gather, wg=wg,
            subgroup=subgroup, st=r.layout,
        )  # fmt: skip
        r.add(kernel, (r.step, x, out), (-(-self.k // (wg * each)), n), f"quantise {self._name}")
