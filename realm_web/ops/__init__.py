"""The operations of a forward pass, recorded into a program: which kernel, which variant, which grid.

Knows the limits of the device and no architecture. A variant is a set of template constants of one kernel;
all of them compute the same function.
"""

from realm_web.ops.activations import Activations
from realm_web.ops.attend import HeadNorm, Pages, Rope, attends_to_bytes, attention, contexts, query_tile
from realm_web.ops.matrices import MATVEC_ROWS, form_of, goes_with, linear, makes_bytes
from realm_web.ops.moe import experts, route
from realm_web.ops.recorder import Recorder
from realm_web.ops.rows import State, embed, gated, qk_norm, rmsnorm, short_conv
from realm_web.ops.sampling import sample
from realm_web.ops.score import pool, row_scores

__all__ = [
    "MATVEC_ROWS", "Activations", "HeadNorm", "Pages", "Recorder", "Rope", "State", "attends_to_bytes",
    "attention", "contexts", "embed", "experts", "form_of", "gated", "goes_with", "linear", "makes_bytes",
    "pool", "qk_norm", "query_tile", "rmsnorm", "route", "row_scores", "sample", "short_conv",
]  # fmt: skip
