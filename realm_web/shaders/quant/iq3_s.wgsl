{# IQ3_S: q per chunk: low 8 bits of 8 row indices; s, 12 words per 256-block: f16 d; a nibble per chunk: scale; a byte
   per chunk: high bits of the indices; a word per chunk: signs; t the grid. weight = d * (2 * scale + 1) * row, signed. #}
# import "quant/lib_grid.wgsl" as grid
# macro decode(w, bind)
{{ bind(w ~ "_q", "vec2<u32>") }}
{{ bind(w ~ "_s", "u32") }}
{{ bind(w ~ "_t", "u32") }}

{{ grid.signed(w) }}

fn {{ w }}_decode(c: u32) -> array<vec4<f32>, 8> {
  let q = {{ w }}_q[c];
  let at = (c >> 3u) * 12u;
  let j = c & 7u;
  let scale = ({{ w }}_s[at + 1u] >> (4u * j)) & 15u;
  let d = unpack2x16float({{ w }}_s[at]).x * f32(2u * scale + 1u);
  let high = {{ w }}_s[at + 2u + (j >> 2u)] >> (8u * (j & 3u));
  let signs = {{ w }}_s[at + 4u + j];
  # for g in range(8)
  let t{{ g }} = {{ w }}_t[((q.{{ "xy"[g // 4] }} >> {{ 8 * (g % 4) }}u) & 255u) | (((high >> {{ g }}u) & 1u) << 8u)];
  # endfor
  # for g in range(4)
  let s{{ g }} = signs >> {{ 8 * g }}u;
  # endfor
{{ grid.rows_of_4(w, "d") }}
}
# endmacro

# macro repack(bind)
{{ bind("q", "vec2<u32>", "read_write") }}
{{ bind("s", "u32", "read_write") }}

fn repack(c: u32, dst: u32) {
  // ggml: f16 d, 64 low indices, 8 bytes of their high bits, 32 bytes of signs, 4 bytes of scales
  let at = (c >> 3u) * 110u;
  let j = c & 7u;
  let to = (dst >> 3u) * 12u;
  q[dst] = vec2<u32>(word(at + 2u + 8u * j), word(at + 6u + 8u * j));
  s[to + 4u + j] = word(at + 74u + 4u * j);
  if (j == 0u) {
    s[to] = half_at(at);
    s[to + 1u] = word(at + 106u);
    s[to + 2u] = word(at + 66u);
    s[to + 3u] = word(at + 70u);
  }
}
# endmacro
