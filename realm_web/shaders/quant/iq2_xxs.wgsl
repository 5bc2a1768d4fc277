{# IQ2_XXS: q per chunk: x: 4 row indices of 8 bits; y: lanes of signs; s, 2 words per 256-block: f16 d; a nibble per chunk:
   scale; t the grid. weight = d * (scale + 1/2) / 4 * row, signed. #}
# import "quant/lib_bits.wgsl" as bits
# import "quant/lib_grid.wgsl" as grid
# import "quant/lib_run.wgsl" as runs
# set run = 2
# set offset, halves, minimum = 0, false, none
# set table = true
# macro ints(w, bind, wg, room, run)
{{ runs.codes(w, bind, "vec2<u32>", run) }}
{{ bind(w ~ "_s", "u32") }}
{{ bind(w ~ "_t", "vec2<u32>") }}

{{ grid.rows(w, "vec2<u32>", 256, wg, room, run) }}
{{ grid.signed(w) }}

{{ runs.fetch(w, "vec2<u32>", run, {"d": w ~ "_s[(c >> 3u) * 2u]", "s": w ~ "_s[(c >> 3u) * 2u + 1u]"}) }}

fn {{ w }}_ints(raw: {{ w }}_Raw, c: u32) -> Ints {
  let d = unpack2x16float(raw.d).x * fma(f32((raw.s >> (4u * (c & 7u))) & 15u), 0.25, 0.125);
  # for g in range(4)
  let t{{ g }} = {{ w }}_at((raw.q.x >> {{ 8 * g }}u) & 255u, c);
  # endfor
  return Ints({{ grid.rows_of_8(w, 0, "raw.q.y") }}, {{ grid.rows_of_8(w, 2, "raw.q.y") }}, vec2<f32>(d), vec2<f32>());
}
# endmacro

# macro repack(bind)
{{ bind("q", "vec2<u32>", "read_write") }}
{{ bind("s", "u32", "read_write") }}

{{ bits.lanes() }}
{{ grid.even() }}

fn repack(c: u32, dst: u32) {
  // ggml: f16 d, then for each chunk a word of 4 indices, and one of 4 times 7 signs and 4 bits of scale
  let at = (c >> 3u) * 66u;
  let from_ = at + 2u + 8u * (c & 7u);
  let sevens = word(from_ + 4u);
  var signs = 0u;
  for (var g = 0u; g < 4u; g++) {
    signs |= even((sevens >> (7u * g)) & 127u) << (8u * g);
  }
  q[dst] = vec2<u32>(word(from_), lanes(signs));
  if ((c & 7u) == 0u) {
    let to = (dst >> 3u) * 2u;
    var scales = 0u;
    for (var i = 0u; i < 8u; i++) {
      scales |= (word(at + 6u + 8u * i) >> 28u) << (4u * i);
    }
    s[to] = half_at(at);
    s[to + 1u] = scales;
  }
}
# endmacro
