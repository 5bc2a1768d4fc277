{# Q5_K: h and q as Q4_K; b lanes of the fifth bit. #}
# import "quant/lib_bits.wgsl" as bits
# import "quant/lib_k.wgsl" as k
# set offset, halves, minimum = 0, false, "chunk"
# macro ints(w, bind)
{{ bind(w ~ "_h", "vec4<u32>") }}
{{ bind(w ~ "_q", "vec4<u32>") }}
{{ bind(w ~ "_b", "u32") }}

{{ k.scale_min(w) }}

struct {{ w }}_Raw {
  h: vec4<u32>,
  q: vec4<u32>,
  b: u32,
}

fn {{ w }}_fetch(c: u32) -> {{ w }}_Raw {
  return {{ w }}_Raw({{ w }}_h[c >> 3u], {{ w }}_q[c], {{ w }}_b[c]);
}

fn {{ w }}_ints(raw: {{ w }}_Raw, c: u32) -> Ints {
  let low = (raw.q & vec4<u32>(0x0f0f0f0fu)) | {{ bits.fifth("raw.b", 0) }};
  let high = ((raw.q >> vec4<u32>(4u)) & vec4<u32>(0x0f0f0f0fu)) | {{ bits.fifth("raw.b", 4) }};
  let dm = {{ w }}_scale_min(raw.h, c & 7u);
  return Ints(low, high, dm.xx, dm.yy);
}
# endmacro

# macro repack(bind)
{{ bind("h", "vec4<u32>", "read_write") }}
{{ bind("q", "vec4<u32>", "read_write") }}
{{ bind("b", "u32", "read_write") }}

{{ k.header() }}

fn repack(c: u32, dst: u32) {
  let at = (c >> 3u) * 176u;
  let j = c & 7u;
  if (j == 0u) {
    h[dst >> 3u] = packed_header(words(at));
  }
  var bits = 0u;
  for (var i = 0u; i < 8u; i++) {
    bits |= ((word(at + 16u + 4u * i) >> j) & 0x01010101u) << i;
  }
  b[dst] = bits;
  let from_ = at + 48u + 32u * (j >> 1u);
  let shift = vec4<u32>(4u * (j & 1u));
  let mask = vec4<u32>(0x0f0f0f0fu);
  q[dst] = ((words(from_) >> shift) & mask) | (((words(from_ + 16u) >> shift) & mask) << vec4<u32>(4u));
}
# endmacro
