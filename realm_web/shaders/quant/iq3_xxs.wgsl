{# IQ3_XXS: q per chunk: 8 row indices of 8 bits; s, 9 words per 256-block: f16 d, then a word per chunk: 4 times 7 signs,
   4 bits scale; t the grid. weight = d * (scale + 1/2) / 2 * row, signed. #}
# import "quant/lib_grid.wgsl" as grid
# macro decode(w, bind)
{{ bind(w ~ "_q", "vec2<u32>") }}
{{ bind(w ~ "_s", "u32") }}
{{ bind(w ~ "_t", "u32") }}

{{ grid.signed(w) }}
{{ grid.even(w) }}

fn {{ w }}_decode(c: u32) -> array<vec4<f32>, 8> {
  let q = {{ w }}_q[c];
  let at = (c >> 3u) * 9u;
  let a = {{ w }}_s[at + 1u + (c & 7u)];
  let d = unpack2x16float({{ w }}_s[at]).x * (0.5 + f32(a >> 28u)) * 0.5;
  # for g in range(8)
  let t{{ g }} = {{ w }}_t[(q.{{ "xy"[g // 4] }} >> {{ 8 * (g % 4) }}u) & 255u];
  # endfor
  # for g in range(4)
  let s{{ g }} = {{ w }}_even((a >> {{ 7 * g }}u) & 127u);
  # endfor
{{ grid.rows_of_4(w, "d") }}
}
# endmacro

# macro repack(bind)
{{ bind("q", "vec2<u32>", "read_write") }}
{{ bind("s", "u32", "read_write") }}

fn repack(c: u32, dst: u32) {
  // ggml: f16 d, 64 indices, 8 words of signs and scale
  let at = (c >> 3u) * 98u;
  let j = c & 7u;
  let to = (dst >> 3u) * 9u;
  q[dst] = vec2<u32>(word(at + 2u + 8u * j), word(at + 6u + 8u * j));
  s[to + 1u + j] = word(at + 66u + 4u * j);
  if (j == 0u) {
    s[to] = half_at(at);
  }
}
# endmacro
