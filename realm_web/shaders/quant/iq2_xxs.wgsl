{# IQ2_XXS: q per chunk: x: 4 row indices of 8 bits; y: 4 times 7 signs, 4 bits scale; s the f16 d of a 256-block; t the
   grid. weight = d * (scale + 1/2) / 4 * row, signed. #}
# import "quant/lib_grid.wgsl" as grid
# macro decode(w, bind)
{{ bind(w ~ "_q", "vec2<u32>") }}
{{ bind(w ~ "_s", "u32") }}
{{ bind(w ~ "_t", "vec2<u32>") }}

{{ grid.signed(w) }}
{{ grid.even(w) }}

fn {{ w }}_decode(c: u32) -> array<vec4<f32>, 8> {
  let q = {{ w }}_q[c];
  let d = unpack2x16float({{ w }}_s[c >> 3u]).x * (0.5 + f32(q.y >> 28u)) * 0.25;
  # for g in range(4)
  let t{{ g }} = {{ w }}_t[(q.x >> {{ 8 * g }}u) & 255u];
  let s{{ g }} = {{ w }}_even((q.y >> {{ 7 * g }}u) & 127u);
  # endfor
{{ grid.rows_of_8(w, ("d", "d")) }}
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
