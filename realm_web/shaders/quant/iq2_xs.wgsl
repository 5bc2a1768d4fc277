{# IQ2_XS: q per chunk: 4 halves of 9 bits row index and 7 signs; s, 3 words per 256-block: f16 d, then a byte per chunk:
   scale of weights 0-15 low, of weights 16-31 high nibble; t the grid. weight = d * (scale + 1/2) / 4 * row, signed. #}
# import "quant/lib_grid.wgsl" as grid
# set offset, halves, minimum = 0, true, none
# set table = true
# macro ints(w, bind, wg)
{{ bind(w ~ "_q", "vec2<u32>") }}
{{ bind(w ~ "_s", "u32") }}
{{ bind(w ~ "_t", "vec2<u32>") }}

{{ grid.table(w, "vec2<u32>", 512, wg) }}
{{ grid.signed(w) }}
{{ grid.even(w) }}

struct {{ w }}_Raw {
  q: vec2<u32>,
  d: u32,
  s: u32,
}

fn {{ w }}_fetch(c: u32) -> {{ w }}_Raw {
  return {{ w }}_Raw({{ w }}_q[c], {{ w }}_s[(c >> 3u) * 3u], {{ w }}_s[(c >> 3u) * 3u + 1u + ((c & 7u) >> 2u)]);
}

fn {{ w }}_ints(raw: {{ w }}_Raw, c: u32) -> Ints {
  let scales = raw.s >> (8u * (c & 3u));
  let d = unpack2x16float(raw.d).x * (0.5 + vec2<f32>(vec2<u32>(scales, scales >> 4u) & vec2<u32>(15u))) * 0.25;
  # for g in range(4)
  let p{{ g }} = raw.q.{{ "xy"[g // 2] }} >> {{ 16 * (g % 2) }}u;
  let t{{ g }} = {{ w }}_{{ "rows" if wg else "t" }}[p{{ g }} & 511u];
  let s{{ g }} = {{ w }}_even((p{{ g }} >> 9u) & 127u);
  # endfor
  return Ints({{ grid.rows_of_8(w, 0) }}, {{ grid.rows_of_8(w, 2) }}, d, vec2<f32>());
}
# endmacro

# macro repack(bind)
{{ bind("q", "vec2<u32>", "read_write") }}
{{ bind("s", "u32", "read_write") }}

fn repack(c: u32, dst: u32) {
  let at = (c >> 3u) * 74u;
  let from_ = at + 2u + 8u * (c & 7u);
  q[dst] = vec2<u32>(word(from_), word(from_ + 4u));
  if ((c & 7u) == 0u) {
    let to = (dst >> 3u) * 3u;
    s[to] = half_at(at);
    s[to + 1u] = word(at + 66u);
    s[to + 2u] = word(at + 70u);
  }
}
# endmacro
