{# Q1_0: q holds lanes (byte b: weight 4i + b at bit i), s the f16 d of a 128-block: weight = bit ? d : -d. #}
# macro decode(w, bind)
{{ bind(w ~ "_q", "u32") }}
{{ bind(w ~ "_s", "u32") }}

fn {{ w }}_decode(c: u32) -> array<vec4<f32>, 8> {
  let q = {{ w }}_q[c];
  let d = unpack2x16float({{ w }}_s[c >> 2u]).x;
  return array<vec4<f32>, 8>(
  # for i in range(8)
    d * (2.0 * vec4<f32>(unpack4xU8((q >> {{ i }}u) & 0x01010101u)) - 1.0){{ "," if not loop.last }}
  # endfor
  );
}
# endmacro

# macro repack(bind)
{{ bind("q", "u32", "read_write") }}
{{ bind("s", "u32", "read_write") }}

fn repack(c: u32, dst: u32) {
  // ggml: f16 d, 128 bits in order
  let at = (c >> 2u) * 18u;
  let bits = word(at + 2u + 4u * (c & 3u));
  var lanes = 0u;
  for (var i = 0u; i < 32u; i++) {
    lanes |= ((bits >> i) & 1u) << (8u * (i & 3u) + (i >> 2u));
  }
  q[dst] = lanes;
  if ((c & 3u) == 0u) {
    s[dst >> 2u] = half_at(at);
  }
}
# endmacro
