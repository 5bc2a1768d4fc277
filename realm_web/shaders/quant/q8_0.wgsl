{# Q8_0: q is 32 signed bytes (2 vec4) per chunk, s the f16 scale d. #}
# set offset, halves, minimum = 0, false, none
# macro ints(w, bind)
{{ bind(w ~ "_q", "vec4<u32>") }}
{{ bind(w ~ "_s", "u32") }}

struct {{ w }}_Raw {
  a: vec4<u32>,
  b: vec4<u32>,
  s: u32,
}

fn {{ w }}_fetch(c: u32) -> {{ w }}_Raw {
  return {{ w }}_Raw({{ w }}_q[c * 2u], {{ w }}_q[c * 2u + 1u], {{ w }}_s[c]);
}

fn {{ w }}_ints(raw: {{ w }}_Raw, c: u32) -> Ints {
  return Ints(raw.a, raw.b, vec2<f32>(unpack2x16float(raw.s).x), vec2<f32>());
}
# endmacro

# macro repack(bind)
{{ bind("q", "vec4<u32>", "read_write") }}
{{ bind("s", "u32", "read_write") }}

fn repack(c: u32, dst: u32) {
  let at = c * 34u;
  s[dst] = half_at(at);
  q[dst * 2u] = words(at + 2u);
  q[dst * 2u + 1u] = words(at + 18u);
}
# endmacro
