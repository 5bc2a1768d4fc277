{# IQ2_XS: q per chunk: 4 halves of 9 bits row index and 7 signs; s, 3 words per 256-block: f16 d, then a byte per chunk:
   scale of weights 0-15 low, of weights 16-31 high nibble; t the grid. weight = d * (scale + 1/2) / 4 * row, signed. #}
# import "quant/lib_grid.wgsl" as grid
# macro decode(w, bind)
{{ bind(w ~ "_q", "vec2<u32>") }}
{{ bind(w ~ "_s", "u32") }}
{{ bind(w ~ "_t", "vec2<u32>") }}

{{ grid.signed(w) }}
{{ grid.even(w) }}

fn {{ w }}_decode(c: u32) -> array<vec4<f32>, 8> {
  let q = {{ w }}_q[c];
  let at = (c >> 3u) * 3u;
  let scales = {{ w }}_s[at + 1u + ((c & 7u) >> 2u)] >> (8u * (c & 3u));
  let d = unpack2x16float({{ w }}_s[at]).x * (0.5 + vec2<f32>(vec2<u32>(scales, scales >> 4u) & vec2<u32>(15u))) * 0.25;
  # for g in range(4)
  let p{{ g }} = q.{{ "xy"[g // 2] }} >> {{ 16 * (g % 2) }}u;
  let t{{ g }} = {{ w }}_t[p{{ g }} & 511u];
  let s{{ g }} = {{ w }}_even((p{{ g }} >> 9u) & 127u);
  # endfor
{{ grid.rows_of_8(w, ("d.x", "d.y")) }}
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
