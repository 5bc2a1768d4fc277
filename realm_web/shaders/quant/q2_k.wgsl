{# Q2_K: q holds crumbs; s, 5 words per 256-block: f16 d and dmin, then a byte for 16 weights: scale low, minimum
   high nibble. weight = d * scale * code - dmin * minimum. #}
# import "quant/lib_crumbs.wgsl" as crumb
# set offset, halves, minimum = 0, true, "halves"
# macro ints(w, bind)
{{ bind(w ~ "_q", "vec2<u32>") }}
{{ bind(w ~ "_s", "u32") }}

struct {{ w }}_Raw {
  q: vec2<u32>,
  d: u32,
  s: u32,
}

fn {{ w }}_fetch(c: u32) -> {{ w }}_Raw {
  return {{ w }}_Raw({{ w }}_q[c], {{ w }}_s[(c >> 3u) * 5u], {{ w }}_s[(c >> 3u) * 5u + 1u + ((c & 7u) >> 1u)]);
}

fn {{ w }}_ints(raw: {{ w }}_Raw, c: u32) -> Ints {
  let dm = unpack2x16float(raw.d);
  let s = raw.s >> (16u * (c & 1u));
  let scale = dm.x * vec2<f32>(vec2<u32>(s, s >> 8u) & vec2<u32>(15u));
  let minimum = dm.y * vec2<f32>(vec2<u32>(s >> 4u, s >> 12u) & vec2<u32>(15u));
  return Ints({{ crumb.sixteen("raw.q", 0) }}, {{ crumb.sixteen("raw.q", 1) }}, scale, minimum);
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
