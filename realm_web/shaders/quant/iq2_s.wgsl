{# IQ2_S: q per chunk: x: low 8 bits of 4 row indices; y: lanes of signs; s, 5 words per 256-block: f16 d, then a half per
   chunk: 4 times 2 high bits of the indices, scales as IQ2_XS; t the grid. weight = d * (scale + 1/2) / 4 * row, signed. #}
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

{{ grid.rows(w, "vec2<u32>", 1024, wg, room, run) }}
{{ grid.signed(w) }}

{{ runs.fetch(w, "vec2<u32>", run, {"d": w ~ "_s[(c >> 3u) * 5u]", "s": w ~ "_s[(c >> 3u) * 5u + 1u + ((c & 7u) >> 1u)]"}) }}

fn {{ w }}_ints(raw: {{ w }}_Raw, c: u32) -> Ints {
  let h = raw.s >> (16u * (c & 1u));
  let d = unpack2x16float(raw.d).x * fma(vec2<f32>(vec2<u32>(h >> 8u, h >> 12u) & vec2<u32>(15u)), vec2<f32>(0.25), vec2<f32>(0.125));
  # for g in range(4)
  let t{{ g }} = {{ w }}_at(((raw.q.x >> {{ 8 * g }}u) & 255u) | (((h >> {{ 2 * g }}u) & 3u) << 8u), c);
  # endfor
  return Ints({{ grid.rows_of_8(w, 0, "raw.q.y") }}, {{ grid.rows_of_8(w, 2, "raw.q.y") }}, d, vec2<f32>());
}
# endmacro

# macro repack(bind)
{{ bind("q", "vec2<u32>", "read_write") }}
{{ bind("s", "u32", "read_write") }}

{{ bits.lanes() }}
fn repack(c: u32, dst: u32) {
  // ggml: f16 d, 32 bytes of low indices, 32 bytes of signs, 8 bytes of high pairs, 8 bytes of scales
  let at = (c >> 3u) * 82u;
  let j = c & 7u;
  q[dst] = vec2<u32>(word(at + 2u + 4u * j), lanes(word(at + 34u + 4u * j)));
  if (j == 0u) {
    let to = (dst >> 3u) * 5u;
    s[to] = half_at(at);
    for (var i = 0u; i < 4u; i++) {
      let high = half_at(at + 66u + 2u * i);
      let scales = half_at(at + 74u + 2u * i);
      s[to + 1u + i] = (high & 0xffu) | ((scales & 0xffu) << 8u) | ((high & 0xff00u) << 8u) | ((scales & 0xff00u) << 16u);
    }
  }
}
# endmacro
