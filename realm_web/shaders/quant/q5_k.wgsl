{# Q5_K: h and q as Q4_K; b lanes of the fifth bit. #}
# import "quant/lib_k.wgsl" as k
# macro decode(w, bind)
{{ bind(w ~ "_h", "vec4<u32>") }}
{{ bind(w ~ "_q", "vec4<u32>") }}
{{ bind(w ~ "_b", "u32") }}

{{ k.scale_min(w) }}

fn {{ w }}_decode(c: u32) -> array<vec4<f32>, 8> {
  let q = {{ w }}_q[c];
  let b = {{ w }}_b[c];
  let dm = {{ w }}_scale_min({{ w }}_h[c >> 3u], c & 7u);
  # for i in range(8)
  let n{{ i }} = unpack4xU8(((q.{{ "xyzw"[i % 4] }} >> {{ 4 * (i // 4) }}u) & 0x0f0f0f0fu) | (((b >> {{ i }}u) & 0x01010101u) << 4u));
  # endfor
  return array<vec4<f32>, 8>(
  # for i in range(8)
    dm.x * vec4<f32>(n{{ i }}) - dm.y{{ "," if not loop.last }}
  # endfor
  );
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
