{# Q8_0: q is 32 signed bytes (2 vec4) per chunk, s the f16 scale d. #}
# macro decode(w, bind)
{{ bind(w ~ "_q", "vec4<u32>") }}
{{ bind(w ~ "_s", "u32") }}

fn {{ w }}_decode(c: u32) -> array<vec4<f32>, 8> {
  let a = {{ w }}_q[c * 2u];
  let b = {{ w }}_q[c * 2u + 1u];
  let d = unpack2x16float({{ w }}_s[c]).x;
  return array<vec4<f32>, 8>(
  # for v in "ab"
  # set last = loop.last
  # for i in "xyzw"
    d * vec4<f32>(unpack4xI8({{ v }}.{{ i }})){{ "," if not (last and loop.last) }}
  # endfor
  # endfor
  );
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
