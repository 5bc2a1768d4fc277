{# IQ3_XXS: q per chunk: 8 row indices of 8 bits; s, 9 words per 256-block: f16 d, then a word per chunk: 4 times 7 signs,
   4 bits scale; t the grid. weight = d * (scale + 1/2) / 2 * row, signed. #}
# import "quant/lib_grid.wgsl" as grid
# set offset, halves, minimum = 0, false, none
# set table = true
# macro ints(w, bind, wg)
{{ bind(w ~ "_q", "vec2<u32>") }}
{{ bind(w ~ "_s", "u32") }}
{{ bind(w ~ "_t", "u32") }}

{{ grid.table(w, "u32", 256, wg) }}
{{ grid.signed(w) }}
{{ grid.even(w) }}

struct {{ w }}_Raw {
  q: vec2<u32>,
  d: u32,
  s: u32,
}

fn {{ w }}_fetch(c: u32) -> {{ w }}_Raw {
  let at = (c >> 3u) * 9u;
  return {{ w }}_Raw({{ w }}_q[c], {{ w }}_s[at], {{ w }}_s[at + 1u + (c & 7u)]);
}

fn {{ w }}_ints(raw: {{ w }}_Raw, c: u32) -> Ints {
  let d = unpack2x16float(raw.d).x * (0.5 + f32(raw.s >> 28u)) * 0.5;
  # for g in range(8)
  let t{{ g }} = {{ w }}_{{ "rows" if wg else "t" }}[(raw.q.{{ "xy"[g // 4] }} >> {{ 8 * (g % 4) }}u) & 255u];
  # endfor
  # for g in range(4)
  let s{{ g }} = {{ w }}_even((raw.s >> {{ 7 * g }}u) & 127u);
  # endfor
  return Ints({{ grid.rows_of_4(w, 0) }}, {{ grid.rows_of_4(w, 4) }}, vec2<f32>(d), vec2<f32>());
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
