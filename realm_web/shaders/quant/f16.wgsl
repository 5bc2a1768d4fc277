{# F16: q holds 4 vec4 per chunk, two weights per u32, the first in the low half. #}
# macro decode(w, bind)
{{ bind(w ~ "_q", "vec4<u32>") }}

fn {{ w }}_decode(c: u32) -> array<vec4<f32>, 8> {
  # for i in range(4)
  let v{{ i }} = {{ w }}_q[c * 4u + {{ i }}u];
  # endfor
  return array<vec4<f32>, 8>(
  # for i in range(4)
    vec4<f32>(unpack2x16float(v{{ i }}.x), unpack2x16float(v{{ i }}.y)),
    vec4<f32>(unpack2x16float(v{{ i }}.z), unpack2x16float(v{{ i }}.w)){{ "," if not loop.last }}
  # endfor
  );
}
# endmacro

# macro repack(bind)
{{ bind("q", "vec4<u32>", "read_write") }}

fn repack(c: u32, dst: u32) {
  for (var i = 0u; i < 4u; i++) {
    q[dst * 4u + i] = words(c * 64u + i * 16u);
  }
}
# endmacro
