{# IQ2_XXS: q per chunk: x: 4 row indices of 8 bits; y: 4 times 7 signs, 4 bits scale; s the f16 d of a 256-block; t the
   grid. weight = d * (scale + 1/2) / 4 * row, signed. #}
# import "quant/lib_grid.wgsl" as grid
# set offset, halves, minimum = 0, false, none
# set table = true
# macro ints(w, bind, wg)
{{ bind(w ~ "_q", "vec2<u32>") }}
{{ bind(w ~ "_s", "u32") }}
{{ bind(w ~ "_t", "vec2<u32>") }}

{{ grid.table(w, "vec2<u32>", 256, wg) }}
{{ grid.signed(w) }}
{{ grid.even(w) }}

struct {{ w }}_Raw {
  q: vec2<u32>,
  s: u32,
}

fn {{ w }}_fetch(c: u32) -> {{ w }}_Raw {
  return {{ w }}_Raw({{ w }}_q[c], {{ w }}_s[c >> 3u]);
}

fn {{ w }}_ints(raw: {{ w }}_Raw, c: u32) -> Ints {
  let d = unpack2x16float(raw.s).x * (0.5 + f32(raw.q.y >> 28u)) * 0.25;
  # for g in range(4)
  let t{{ g }} = {{ w }}_{{ "rows" if wg else "t" }}[(raw.q.x >> {{ 8 * g }}u) & 255u];
  let s{{ g }} = {{ w }}_even((raw.q.y >> {{ 7 * g }}u) & 127u);
  # endfor
  return Ints({{ grid.rows_of_8(w, 0) }}, {{ grid.rows_of_8(w, 2) }}, vec2<f32>(d), vec2<f32>());
}
# endmacro

# macro repack(bind)
{{ bind("q", "vec2<u32>", "read_write") }}
{{ bind("s", "u32", "read_write") }}

fn repack(c: u32, dst: u32) {
  let at = (c >> 3u) * 66u;
  let from_ = at + 2u + 8u * (c & 7u);
  q[dst] = vec2<u32>(word(from_), word(from_ + 4u));
  if ((c & 7u) == 0u) {
    s[dst >> 3u] = half_at(at);
  }
}
# endmacro
