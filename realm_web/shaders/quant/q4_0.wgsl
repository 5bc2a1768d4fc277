{# Q4_0: q is the 16 nibble bytes of a chunk (byte i: weight i low, weight i+16 high), s the f16 scale d. #}
# set offset, halves, minimum = 8, false, none
# macro ints(w, bind)
{{ bind(w ~ "_q", "vec4<u32>") }}
{{ bind(w ~ "_s", "u32") }}

struct {{ w }}_Raw {
  q: vec4<u32>,
  s: u32,
}

fn {{ w }}_fetch(c: u32) -> {{ w }}_Raw {
  return {{ w }}_Raw({{ w }}_q[c], {{ w }}_s[c]);
}

fn {{ w }}_ints(raw: {{ w }}_Raw, c: u32) -> Ints {
  let low = raw.q & vec4<u32>(0x0f0f0f0fu);
  let high = (raw.q >> vec4<u32>(4u)) & vec4<u32>(0x0f0f0f0fu);
  return Ints(low, high, vec2<f32>(unpack2x16float(raw.s).x), vec2<f32>());
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
