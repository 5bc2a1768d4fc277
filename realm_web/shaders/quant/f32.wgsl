{# F32: q holds 8 vec4 per chunk of 32 weights. #}
# macro decode(w, bind)
{{ bind(w ~ "_q", "vec4<u32>") }}

fn {{ w }}_decode(c: u32) -> array<vec4<f32>, 8> {
  return array<vec4<f32>, 8>(
  # for i in range(8)
    bitcast<vec4<f32>>({{ w }}_q[c * 8u + {{ i }}u]){{ "," if not loop.last }}
  # endfor
  );
}
# endmacro

# macro repack(bind)
{{ bind("q", "vec4<u32>", "read_write") }}

fn repack(c: u32, dst: u32) {
  for (var i = 0u; i < 8u; i++) {
    q[dst * 8u + i] = words(c * 128u + i * 16u);
  }
}
# endmacro
