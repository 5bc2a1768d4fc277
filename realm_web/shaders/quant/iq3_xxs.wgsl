{# IQ3_XXS: q per chunk: 8 row indices of 8 bits; s, 10 words per 256-block: f16 d; a nibble per chunk: scale; a word per
   chunk: lanes of signs; t the grid. weight = d * (scale + 1/2) / 2 * row, signed. #}
# import "quant/lib_bits.wgsl" as bits
# import "quant/lib_grid.wgsl" as grid
# set offset, halves, minimum = 0, false, none
# set table = true
# macro ints(w, bind, wg, room)
{{ bind(w ~ "_q", "vec2<u32>") }}
{{ bind(w ~ "_s", "u32") }}
{{ bind(w ~ "_t", "u32") }}

{{ grid.rows(w, "u32", 256, wg, room) }}
{{ grid.signed(w) }}

struct {{ w }}_Raw {
  q: vec2<u32>,
  d: u32,
  scales: u32,
  signs: u32,
}

fn {{ w }}_fetch(c: u32) -> {{ w }}_Raw {
  let at = (c >> 3u) * 10u;
  return {{ w }}_Raw({{ w }}_q[c], {{ w }}_s[at], {{ w }}_s[at + 1u], {{ w }}_s[at + 2u + (c & 7u)]);
}

fn {{ w }}_ints(raw: {{ w }}_Raw, c: u32) -> Ints {
  let d = unpack2x16float(raw.d).x * fma(f32((raw.scales >> (4u * (c & 7u))) & 15u), 0.5, 0.25);
  # for g in range(8)
  let t{{ g }} = {{ w }}_at((raw.q.{{ "xy"[g // 4] }} >> {{ 8 * (g % 4) }}u) & 255u, c);
  # endfor
  return Ints({{ grid.rows_of_4(w, 0, "raw.signs") }}, {{ grid.rows_of_4(w, 4, "raw.signs") }}, vec2<f32>(d), vec2<f32>());
}
# endmacro

# macro repack(bind)
{{ bind("q", "vec2<u32>", "read_write") }}
{{ bind("s", "u32", "read_write") }}

{{ bits.lanes() }}
{{ grid.even() }}

fn repack(c: u32, dst: u32) {
  // ggml: f16 d, 64 indices, 8 words of 4 times 7 signs and 4 bits of scale
  let at = (c >> 3u) * 98u;
  let j = c & 7u;
  let to = (dst >> 3u) * 10u;
  q[dst] = vec2<u32>(word(at + 2u + 8u * j), word(at + 6u + 8u * j));
  let sevens = word(at + 66u + 4u * j);
  var signs = 0u;
  for (var g = 0u; g < 4u; g++) {
    signs |= even((sevens >> (7u * g)) & 127u) << (8u * g);
  }
  s[to + 2u + j] = lanes(signs);
  if (j == 0u) {
    var scales = 0u;
    for (var i = 0u; i < 8u; i++) {
      scales |= (word(at + 66u + 4u * i) >> 28u) << (4u * i);
    }
    s[to] = half_at(at);
    s[to + 1u] = scales;
  }
}
# endmacro
