{# Q5_0: q and s as Q4_0; h lanes of the fifth bit: weight = d * (value - 16). #}
# import "quant/lib_bits.wgsl" as bits
# macro decode(w, bind)
{{ bind(w ~ "_q", "vec4<u32>") }}
{{ bind(w ~ "_s", "u32") }}
{{ bind(w ~ "_h", "u32") }}

fn {{ w }}_decode(c: u32) -> array<vec4<f32>, 8> {
  let q = {{ w }}_q[c];
  let d = unpack2x16float({{ w }}_s[c]).x;
  let h = {{ w }}_h[c];
  # for i in range(8)
  let n{{ i }} = unpack4xU8(((q.{{ "xyzw"[i % 4] }} >> {{ 4 * (i // 4) }}u) & 0x0f0f0f0fu) | (((h >> {{ i }}u) & 0x01010101u) << 4u));
  # endfor
  return array<vec4<f32>, 8>(
  # for i in range(8)
    d * (vec4<f32>(n{{ i }}) - 16.0){{ "," if not loop.last }}
  # endfor
  );
}
# endmacro

# macro repack(bind)
{{ bind("q", "vec4<u32>", "read_write") }}
{{ bind("s", "u32", "read_write") }}
{{ bind("h", "u32", "read_write") }}

{{ bits.lanes() }}

fn repack(c: u32, dst: u32) {
  let at = c * 22u;
  s[dst] = half_at(at);
  h[dst] = lanes(word(at + 2u));
  q[dst] = words(at + 6u);
}
# endmacro
