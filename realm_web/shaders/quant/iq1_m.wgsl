{# IQ1_M: q per chunk: low 8 bits of 4 row indices; s, 6 words per 256-block: a nibble per row: 3 high bits of the index,
   sign of delta; then 4 halves of 4 scales (3 bits, for 16 weights each) and a nibble of the f16 d; t the grid.
   weight = d * (2 * scale + 1) * (row + delta). #}
# import "quant/lib_grid.wgsl" as grid
# macro decode(w, bind)
{{ bind(w ~ "_q", "u32") }}
{{ bind(w ~ "_s", "u32") }}
{{ bind(w ~ "_t", "vec2<u32>") }}

fn {{ w }}_decode(c: u32) -> array<vec4<f32>, 8> {
  let q = {{ w }}_q[c];
  let at = (c >> 3u) * 6u;
  let j = c & 7u;
  let h = {{ w }}_s[at + (j >> 1u)] >> (16u * (j & 1u));
  let a = {{ w }}_s[at + 4u];
  let b = {{ w }}_s[at + 5u];
  let bits = ((a >> 12u) & 0xfu) | ((a >> 24u) & 0xf0u) | ((b >> 4u) & 0xf00u) | ((b >> 16u) & 0xf000u);
  let scales = select(b, a, j < 4u) >> (16u * ((j >> 1u) & 1u) + 6u * (j & 1u));
  let scale = unpack2x16float(bits).x * vec2<f32>(2u * (vec2<u32>(scales, scales >> 3u) & vec2<u32>(7u)) + 1u);
  # for g in range(4)
  let t{{ g }} = {{ w }}_t[((q >> {{ 8 * g }}u) & 255u) | (((h >> {{ 4 * g }}u) & 7u) << 8u)];
  let d{{ g }} = select(0.125, -0.125, ((h >> {{ 4 * g + 3 }}u) & 1u) != 0u);
  # endfor
{{ grid.rows_of_iq1(("scale.x", "scale.y")) }}
}
# endmacro

# macro repack(bind)
{{ bind("q", "u32", "read_write") }}
{{ bind("s", "u32", "read_write") }}

fn repack(c: u32, dst: u32) {
  // ggml: 32 low indices, 16 bytes of nibbles, 4 halves
  let at = (c >> 3u) * 56u;
  let j = c & 7u;
  q[dst] = word(at + 4u * j);
  if (j == 0u) {
    let to = (dst >> 3u) * 6u;
    for (var i = 0u; i < 6u; i++) {
      s[to + i] = word(at + 32u + 4u * i);
    }
  }
}
# endmacro
