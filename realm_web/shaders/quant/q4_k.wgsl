{# Q4_K: h is the header of a 256-block, q the nibbles of a chunk in Q4_0's order. #}
# import "quant/lib_k.wgsl" as k
# set offset, halves, minimum = 0, false, "chunk"
# macro ints(w, bind)
{{ bind(w ~ "_h", "vec4<u32>") }}
{{ bind(w ~ "_q", "vec4<u32>") }}

{{ k.scale_min(w) }}

struct {{ w }}_Raw {
  h: vec4<u32>,
  q: vec4<u32>,
}

fn {{ w }}_fetch(c: u32) -> {{ w }}_Raw {
  return {{ w }}_Raw({{ w }}_h[c >> 3u], {{ w }}_q[c]);
}

fn {{ w }}_ints(raw: {{ w }}_Raw, c: u32) -> Ints {
  let low = raw.q & vec4<u32>(0x0f0f0f0fu);
  let high = (raw.q >> vec4<u32>(4u)) & vec4<u32>(0x0f0f0f0fu);
  let dm = {{ w }}_scale_min(raw.h, c & 7u);
  return Ints(low, high, dm.xx, dm.yy);
}
# endmacro

# macro repack(bind)
{{ bind("h", "vec4<u32>", "read_write") }}
{{ bind("q", "vec4<u32>", "read_write") }}

{{ k.header() }}

fn repack(c: u32, dst: u32) {
  let at = (c >> 3u) * 144u;
  let j = c & 7u;
  if (j == 0u) {
    h[dst >> 3u] = packed_header(words(at));
  }
  // ggml keeps two chunks in 32 bytes: the even one in the low nibbles, the odd one in the high nibbles
  let from_ = at + 16u + 32u * (j >> 1u);
  let shift = vec4<u32>(4u * (j & 1u));
  let mask = vec4<u32>(0x0f0f0f0fu);
  q[dst] = ((words(from_) >> shift) & mask) | (((words(from_ + 16u) >> shift) & mask) << vec4<u32>(4u));
}
# endmacro
