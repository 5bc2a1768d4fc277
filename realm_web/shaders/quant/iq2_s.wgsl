{# IQ2_S: q per chunk: x: low 8 bits of 4 row indices; y: 32 signs; s, 5 words per 256-block: f16 d, then a half per
   chunk: 4 times 2 high bits of the indices, scales as IQ2_XS; t the grid. weight = d * (scale + 1/2) / 4 * row, signed. #}
# import "quant/lib_grid.wgsl" as grid
# macro decode(w, bind)
{{ bind(w ~ "_q", "vec2<u32>") }}
{{ bind(w ~ "_s", "u32") }}
{{ bind(w ~ "_t", "vec2<u32>") }}

{{ grid.signed(w) }}

fn {{ w }}_decode(c: u32) -> array<vec4<f32>, 8> {
  let q = {{ w }}_q[c];
  let at = (c >> 3u) * 5u;
  let h = {{ w }}_s[at + 1u + ((c & 7u) >> 1u)] >> (16u * (c & 1u));
  let d = unpack2x16float({{ w }}_s[at]).x * (0.5 + vec2<f32>(vec2<u32>(h >> 8u, h >> 12u) & vec2<u32>(15u))) * 0.25;
  # for g in range(4)
  let t{{ g }} = {{ w }}_t[((q.x >> {{ 8 * g }}u) & 255u) | (((h >> {{ 2 * g }}u) & 3u) << 8u)];
  let s{{ g }} = q.y >> {{ 8 * g }}u;
  # endfor
{{ grid.rows_of_8(w, ("d.x", "d.y")) }}
}
# endmacro

# macro repack(bind)
{{ bind("q", "vec2<u32>", "read_write") }}
{{ bind("s", "u32", "read_write") }}

fn repack(c: u32, dst: u32) {
  // ggml: f16 d, 32 bytes of low indices, 32 bytes of signs, 8 bytes of high pairs, 8 bytes of scales
  let at = (c >> 3u) * 82u;
  let j = c & 7u;
  q[dst] = vec2<u32>(word(at + 2u + 4u * j), word(at + 34u + 4u * j));
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
