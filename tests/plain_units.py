"""Matrix units spelled out in plain WGSL, so that kernels for them run where there are none.

Of a fragment's 256 sums each of a subgroup's 32 threads keeps 8; operands are not loaded, but read from where
they would have been.
"""

from __future__ import annotations

import re

DIRECTIVES = (
    r"enable chromium_experimental_subgroup_matrix;|diagnostic\(off, chromium.subgroup_matrix_uniformity\);"
)
RESULT = r"subgroup_matrix_result<f32, 16, 16>\(\)"
LOAD = (
    r"let (\w+) =\s+subgroupMatrixLoad<subgroup_matrix_\w+<f16, 16, 16>, row_major>"
    r"\(&(\w+), (.*), ([^,;]*?)\)\s*;"
)
MULTIPLY = r"(\w+) = subgroupMatrixMultiplyAccumulate\((\w+), (\w+), \w+\);"
STORE = r"subgroupMatrixStore<(row|col)_major>\(&(\w+), (.*), (\w+), ([^,;]*?)\)\s*;"
PLACE = "let i_ = lid % 32u / 2u; let j_ = lid % 2u * 8u + e_;"
# naga takes no bitcast of two words to four halves
HALVES = """
fn halves_of_word(w: u32) -> vec2<f16> {
  return vec2<f16>(unpack2x16float(w));
}

fn halves_of_words(w: vec2<u32>) -> vec4<f16> {
  return vec4<f16>(halves_of_word(w.x), halves_of_word(w.y));
}
"""


def spelled_out(code: str) -> str:
    """The WGSL of a kernel, with `lid` its local invocation index and n_wg its grid, without matrix units.

    How often its loops run is not said before, so that no driver unrolls them.
    """
    code = re.sub(RESULT, "array<f32, 8>()", re.sub(DIRECTIVES, "", code))
    arrays = {name: array for name, array, _, _ in re.findall(LOAD, code)}
    code = re.sub(LOAD, r"let \1 = vec2<u32>(\3, \4);", code)

    def multiplied(match: re.Match) -> str:
        total, a, b = match.groups()
        term = f"f32({arrays[a]}[{a}.x + i_ * {a}.y + k_]) * f32({arrays[b]}[{b}.x + k_ * {b}.y + j_])"
        sums = f"var sum_ = 0.0; {_repeat('k_', 16)} {{ sum_ += {term}; }} {total}[e_] += sum_;"
        return f"{_repeat('e_', 8)} {{ {PLACE} {sums} }}"

    def stored(match: re.Match) -> str:
        major, array, at, total, stride = match.groups()
        place = "at_ + i_ * stride_ + j_" if major == "row" else "at_ + j_ * stride_ + i_"
        each = f"{_repeat('e_', 8)} {{ {PLACE} {array}[{place}] = {total}[e_]; }}"
        return f"{{ let at_ = {at}; let stride_ = {stride}; {each} }}"

    code = re.sub(STORE, stored, re.sub(MULTIPLY, multiplied, code))
    code = code.replace("bitcast<vec4<f16>>", "halves_of_words").replace(
        "bitcast<vec2<f16>>", "halves_of_word"
    )
    return code + HALVES


def _repeat(name: str, times: int) -> str:
    return f"for (var {name} = 0u; {name} < {times}u * min(n_wg.x, 1u); {name}++)"
