{# Q2_K: q holds crumbs; s, 5 words per 256-block: f16 d and dmin, then a byte for 16 weights: scale low, minimum
   high nibble. weight = d * scale * code - dmin * minimum. #}
# import "quant/lib_crumbs.wgsl" as crumb
# macro decode(w, bind)
{{ bind(w ~ "_q", "vec2<u32>") }}
{{ bind(w ~ "_s", "u32") }}

fn {{ w }}_decode(c: u32) -> array<vec4<f32>, 8> {
  let q = {{ w }}_q[c];
  let at = (c >> 3u) * 5u;
  let dm = unpack2x16float({{ w }}_s[at]);
  let s = {{ w }}_s[at + 1u + ((c & 7u) >> 1u)] >> (16u * (c & 1u));
  let scale = dm.x * vec2<f32>(vec2<u32>(s, s >> 8u) & vec2<u32>(15u));
  let minimum = dm.y * vec2<f32>(vec2<u32>(s >> 4u, s >> 12u) & vec2<u32>(15u));
  return array<vec4<f32>, 8>(
  # for i in range(8)
    scale.{{ "xy"[i // 4] }} * vec4<f32>(unpack4xU8({{ crumb.four("q", i) }})) - minimum.{{ "xy"[i // 4] }}{{ "," if not loop.last }}
  # endfor
  );
}
# endmacro

# macro repack(bind)
{{ bind("q", "vec2<u32>", "read_write") }}
{{ bind("s", "u32", "read_write") }}

{{ crumb.pack() }}

fn repack(c: u32, dst: u32) {
  // ggml: 16 scale bytes, 64 bytes of pairs (32 for each half of the block, chunk k of it at bits 2k), f16 d, f16 dmin
  let at = (c >> 3u) * 84u;
  let j = c & 7u;
  q[dst] = crumbs(at + 16u + 32u * (j >> 2u), 2u * (j & 3u));
  if (j == 0u) {
    let to = (dst >> 3u) * 5u;
    s[to] = word(at + 80u);
    for (var i = 0u; i < 4u; i++) {
      s[to + 1u + i] = word(at + 4u * i);
    }
  }
}
# endmacro
