{# Q4_0: q is the 16 nibble bytes of a chunk (byte i: weight i low, weight i+16 high), s the f16 scale d. #}
# macro decode(w, bind)
{{ bind(w ~ "_q", "vec4<u32>") }}
{{ bind(w ~ "_s", "u32") }}

fn {{ w }}_decode(c: u32) -> array<vec4<f32>, 8> {
  let q = {{ w }}_q[c];
  let d = unpack2x16float({{ w }}_s[c]).x;
  let low = q & vec4<u32>(0x0f0f0f0fu);
  let high = (q >> vec4<u32>(4u)) & vec4<u32>(0x0f0f0f0fu);
  return array<vec4<f32>, 8>(
  # for half in ("low", "high")
  # set last = loop.last
  # for i in "xyzw"
    d * (vec4<f32>(unpack4xU8({{ half }}.{{ i }})) - 8.0){{ "," if not (last and loop.last) }}
  # endfor
  # endfor
  );
}
# endmacro

# macro repack(bind)
{{ bind("q", "vec4<u32>", "read_write") }}
{{ bind("s", "u32", "read_write") }}

fn repack(c: u32, dst: u32) {
  let at = c * 18u;
  s[dst] = half_at(at);
  q[dst] = words(at + 2u);
}
# endmacro
