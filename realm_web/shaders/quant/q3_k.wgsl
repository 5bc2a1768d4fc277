{# Q3_K: q holds crumbs (low two bits), b lanes (third bit); s, 5 words per 256-block: f16 d, then a byte for 16
   weights: scale + 32. weight = d * scale * (code - 4). #}
# import "quant/lib_crumbs.wgsl" as crumb
# import "quant/lib_bits.wgsl" as bits
# set offset, halves, minimum = 4, true, none
# macro ints(w, bind)
{{ bind(w ~ "_q", "vec2<u32>") }}
{{ bind(w ~ "_b", "u32") }}
{{ bind(w ~ "_s", "u32") }}

struct {{ w }}_Raw {
  q: vec2<u32>,
  b: u32,
  d: u32,
  s: u32,
}

fn {{ w }}_fetch(c: u32) -> {{ w }}_Raw {
  return {{ w }}_Raw({{ w }}_q[c], {{ w }}_b[c], {{ w }}_s[(c >> 3u) * 5u], {{ w }}_s[(c >> 3u) * 5u + 1u + ((c & 7u) >> 1u)]);
}

fn {{ w }}_ints(raw: {{ w }}_Raw, c: u32) -> Ints {
  let low = {{ crumb.sixteen("raw.q", 0) }} | {{ bits.at("raw.b", 0, 2) }};
  let high = {{ crumb.sixteen("raw.q", 1) }} | {{ bits.at("raw.b", 4, 2) }};
  let s = raw.s >> (16u * (c & 1u));
  let scale = unpack2x16float(raw.d).x * (vec2<f32>(vec2<u32>(s, s >> 8u) & vec2<u32>(255u)) - 32.0);
  return Ints(low, high, scale, vec2<f32>());
}
# endmacro

# macro repack(bind)
{{ bind("q", "vec2<u32>", "read_write") }}
{{ bind("b", "u32", "read_write") }}
{{ bind("s", "u32", "read_write") }}

{{ crumb.pack() }}

fn repack(c: u32, dst: u32) {
  // ggml: 32 bytes of third bits (bit j for chunk j), 64 bytes of pairs as Q2_K, 12 bytes of scales, f16 d
  let at = (c >> 3u) * 110u;
  let j = c & 7u;
  q[dst] = crumbs(at + 32u + 32u * (j >> 2u), 2u * (j & 3u));
  var bits = 0u;
  for (var i = 0u; i < 8u; i++) {
    bits |= ((word(at + 4u * i) >> j) & 0x01010101u) << i;
  }
  b[dst] = bits;
  if (j == 0u) {
    // low nibbles of scales 0-7 and (high nibbles) 8-15; then the high pairs of scales i, i + 4, i + 8, i + 12 in byte i
    let to = (dst >> 3u) * 5u;
    s[to] = half_at(at + 108u);
    let high = word(at + 104u);
    for (var i = 0u; i < 4u; i++) {
      let low = word(at + 96u + 4u * (i & 1u)) >> (4u * (i >> 1u));
      s[to + 1u + i] = (low & 0x0f0f0f0fu) | (((high >> (2u * i)) & 0x03030303u) << 4u);
    }
  }
}
# endmacro
