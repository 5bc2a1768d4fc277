{# IQ2_XS: q per chunk: x: low 8 bits of 4 row indices; y: lanes of signs; s, 4 words per 256-block: f16 d; a nibble per chunk:
   ninth bits of the indices; a byte per chunk: scale of weights 0-15 low, of weights 16-31 high nibble; t the grid.
   weight = d * (scale + 1/2) / 4 * row, signed. #}
# import "quant/lib_bits.wgsl" as bits
# import "quant/lib_grid.wgsl" as grid
# import "quant/lib_run.wgsl" as runs
# set run = 2
# set offset, halves, minimum = 0, true, none
# set table = true
# macro ints(w, bind, wg, room, run)
{{ runs.codes(w, bind, "vec2<u32>", run) }}
{{ bind(w ~ "_s", "u32") }}
{{ bind(w ~ "_t", "vec2<u32>") }}

{{ grid.rows(w, "vec2<u32>", 512, wg, room, run) }}
{{ grid.signed(w) }}

{{ runs.fetch(w, "vec2<u32>", run, {"d": w ~ "_s[(c >> 3u) * 4u]", "high": w ~ "_s[(c >> 3u) * 4u + 1u]", "s": w ~ "_s[(c >> 3u) * 4u + 2u + ((c & 7u) >> 2u)]"}) }}

fn {{ w }}_ints(raw: {{ w }}_Raw, c: u32) -> Ints {
  let scales = raw.s >> (8u * (c & 3u));
  let d = unpack2x16float(raw.d).x * fma(vec2<f32>(vec2<u32>(scales, scales >> 4u) & vec2<u32>(15u)), vec2<f32>(0.25), vec2<f32>(0.125));
  let high = raw.high >> (4u * (c & 7u));
  # for g in range(4)
  let t{{ g }} = {{ w }}_at(((raw.q.x >> {{ 8 * g }}u) & 255u) | (((high >> {{ g }}u) & 1u) << 8u), c);
  # endfor
  return Ints({{ grid.rows_of_8(w, 0, "raw.q.y") }}, {{ grid.rows_of_8(w, 2, "raw.q.y") }}, d, vec2<f32>());
}
# endmacro

# macro repack(bind)
{{ bind("q", "vec2<u32>", "read_write") }}
{{ bind("s", "u32", "read_write") }}

{{ bits.lanes() }}
{{ grid.even() }}

fn repack(c: u32, dst: u32) {
  // ggml: f16 d, for each chunk 4 halves of 9 bits of index and 7 signs, 8 bytes of scales
  let at = (c >> 3u) * 74u;
  let from_ = at + 2u + 8u * (c & 7u);
  var found = vec2<u32>(0u);
  for (var g = 0u; g < 4u; g++) {
    let both = half_at(from_ + 2u * g);
    found |= vec2<u32>(both & 255u, even(both >> 9u)) << vec2<u32>(8u * g);
  }
  q[dst] = vec2<u32>(found.x, lanes(found.y));
  if ((c & 7u) == 0u) {
    let to = (dst >> 3u) * 4u;
    var high = 0u;
    for (var i = 0u; i < 32u; i++) {
      high |= ((half_at(at + 2u + 2u * i) >> 8u) & 1u) << i;
    }
    s[to] = half_at(at);
    s[to + 1u] = high;
    s[to + 2u] = word(at + 66u);
    s[to + 3u] = word(at + 70u);
  }
}
# endmacro
