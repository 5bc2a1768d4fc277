{# IQ1_S: q per chunk: low 8 bits of 4 row indices; s, 5 words per 256-block: f16 d, then a half per chunk: 4 times 3 high
   bits of the indices, 3 bits scale, sign of delta; t the grid. weight = d * (2 * scale + 1) * (row + delta). #}
# import "quant/lib_grid.wgsl" as grid
# set offset, halves, minimum = 9, false, none
# set table = true
# macro ints(w, bind, wg)
{{ bind(w ~ "_q", "u32") }}
{{ bind(w ~ "_s", "u32") }}
{{ bind(w ~ "_t", "vec2<u32>") }}

{{ grid.codes(w, 2048, wg) }}

struct {{ w }}_Raw {
  q: u32,
  d: u32,
  s: u32,
}

fn {{ w }}_fetch(c: u32) -> {{ w }}_Raw {
  return {{ w }}_Raw({{ w }}_q[c], {{ w }}_s[(c >> 3u) * 5u], {{ w }}_s[(c >> 3u) * 5u + 1u + ((c & 7u) >> 1u)]);
}

fn {{ w }}_ints(raw: {{ w }}_Raw, c: u32) -> Ints {
  let h = raw.s >> (16u * (c & 1u));
  let scale = unpack2x16float(raw.d).x * f32(2u * ((h >> 12u) & 7u) + 1u);
  # for g in range(4)
  let t{{ g }} = {{ w }}_codes(((raw.q >> {{ 8 * g }}u) & 255u) | (((h >> {{ 3 * g }}u) & 7u) << 8u));
  let n{{ g }} = select(0x02020202u, 0u, (h & 0x8000u) != 0u);
  # endfor
  return Ints({{ grid.rows_of_iq1(w, 0) }}, {{ grid.rows_of_iq1(w, 2) }}, vec2<f32>(0.125 * scale), vec2<f32>());
}
# endmacro

# macro repack(bind)
{{ bind("q", "u32", "read_write") }}
{{ bind("s", "u32", "read_write") }}

fn repack(c: u32, dst: u32) {
  // ggml: f16 d, 32 low indices, 8 halves
  let at = (c >> 3u) * 50u;
  let j = c & 7u;
  q[dst] = word(at + 2u + 4u * j);
  if (j == 0u) {
    let to = (dst >> 3u) * 5u;
    s[to] = half_at(at);
    for (var i = 0u; i < 4u; i++) {
      s[to + 1u + i] = word(at + 34u + 4u * i);
    }
  }
}
# endmacro
