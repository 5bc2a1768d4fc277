{# IQ1_M: q per chunk: low 8 bits of 4 row indices; s, 6 words per 256-block: a nibble per row: 3 high bits of the index,
   sign of delta; then 4 halves of 4 scales (3 bits, for 16 weights each) and a nibble of the f16 d; t the grid.
   weight = d * (2 * scale + 1) * (row + delta). #}
# import "quant/lib_grid.wgsl" as grid
# set offset, halves, minimum = 9, true, none
# set table = true
# macro ints(w, bind, wg)
{{ bind(w ~ "_q", "u32") }}
{{ bind(w ~ "_s", "u32") }}
{{ bind(w ~ "_t", "vec2<u32>") }}

{{ grid.codes(w, 2048, wg) }}

struct {{ w }}_Raw {
  q: u32,
  h: u32,
  a: u32,
  b: u32,
}

fn {{ w }}_fetch(c: u32) -> {{ w }}_Raw {
  let at = (c >> 3u) * 6u;
  return {{ w }}_Raw({{ w }}_q[c], {{ w }}_s[at + ((c & 7u) >> 1u)], {{ w }}_s[at + 4u], {{ w }}_s[at + 5u]);
}

fn {{ w }}_ints(raw: {{ w }}_Raw, c: u32) -> Ints {
  let j = c & 7u;
  let h = raw.h >> (16u * (j & 1u));
  let bits = ((raw.a >> 12u) & 0xfu) | ((raw.a >> 24u) & 0xf0u) | ((raw.b >> 4u) & 0xf00u) | ((raw.b >> 16u) & 0xf000u);
  let scales = select(raw.b, raw.a, j < 4u) >> (16u * ((j >> 1u) & 1u) + 6u * (j & 1u));
  let scale = unpack2x16float(bits).x * vec2<f32>(2u * (vec2<u32>(scales, scales >> 3u) & vec2<u32>(7u)) + 1u);
  # for g in range(4)
  let t{{ g }} = {{ w }}_codes(((raw.q >> {{ 8 * g }}u) & 255u) | (((h >> {{ 4 * g }}u) & 7u) << 8u));
  let n{{ g }} = select(0x02020202u, 0u, ((h >> {{ 4 * g + 3 }}u) & 1u) != 0u);
  # endfor
  return Ints({{ grid.rows_of_iq1(w, 0) }}, {{ grid.rows_of_iq1(w, 2) }}, 0.125 * scale, vec2<f32>());
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
