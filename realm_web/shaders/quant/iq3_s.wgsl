{# IQ3_S: q per chunk: low 8 bits of 8 row indices; s, 12 words per 256-block: f16 d; a nibble per chunk: scale; a byte
   per chunk: high bits of the indices; a word per chunk: lanes of signs; t the grid. weight = d * (2 * scale + 1) * row, signed. #}
# import "quant/lib_bits.wgsl" as bits
# import "quant/lib_grid.wgsl" as grid
# set offset, halves, minimum = 0, false, none
# set table = true
# macro ints(w, bind, wg, room)
{{ bind(w ~ "_q", "vec2<u32>") }}
{{ bind(w ~ "_s", "u32") }}
{{ bind(w ~ "_t", "u32") }}

{{ grid.rows(w, "u32", 512, wg, room) }}
{{ grid.signed(w, odd=true) }}

struct {{ w }}_Raw {
  q: vec2<u32>,
  d: u32,
  scales: u32,
  high: u32,
  signs: u32,
}

fn {{ w }}_fetch(c: u32) -> {{ w }}_Raw {
  let at = (c >> 3u) * 12u;
  return {{ w }}_Raw({{ w }}_q[c], {{ w }}_s[at], {{ w }}_s[at + 1u], {{ w }}_s[at + 2u + ((c & 7u) >> 2u)], {{ w }}_s[at + 4u + (c & 7u)]);
}

fn {{ w }}_ints(raw: {{ w }}_Raw, c: u32) -> Ints {
  let scale = (raw.scales >> (4u * (c & 7u))) & 15u;
  let d = unpack2x16float(raw.d).x * f32(2u * scale + 1u);
  let high = raw.high >> (8u * (c & 3u));
  # for g in range(8)
  let t{{ g }} = {{ w }}_at(((raw.q.{{ "xy"[g // 4] }} >> {{ 8 * (g % 4) }}u) & 255u) | (((high >> {{ g }}u) & 1u) << 8u), c);
  # endfor
  return Ints({{ grid.rows_of_4(w, 0, "raw.signs") }}, {{ grid.rows_of_4(w, 4, "raw.signs") }}, vec2<f32>(d), vec2<f32>());
}
# endmacro

# macro repack(bind)
{{ bind("q", "vec2<u32>", "read_write") }}
{{ bind("s", "u32", "read_write") }}

{{ bits.lanes() }}
fn repack(c: u32, dst: u32) {
  // ggml: f16 d, 64 low indices, 8 bytes of their high bits, 32 bytes of signs, 4 bytes of scales
  let at = (c >> 3u) * 110u;
  let j = c & 7u;
  let to = (dst >> 3u) * 12u;
  q[dst] = vec2<u32>(word(at + 2u + 8u * j), word(at + 6u + 8u * j));
  s[to + 4u + j] = lanes(word(at + 74u + 4u * j));
  if (j == 0u) {
    s[to] = half_at(at);
    s[to + 1u] = word(at + 106u);
    s[to + 2u] = word(at + 66u);
    s[to + 3u] = word(at + 70u);
  }
}
# endmacro
