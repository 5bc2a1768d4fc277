{# Q4_1: q as Q4_0; s holds f16 d (low half) and f16 m (high half): weight = d * nibble + m. #}
# macro decode(w, bind)
{{ bind(w ~ "_q", "vec4<u32>") }}
{{ bind(w ~ "_s", "u32") }}

fn {{ w }}_decode(c: u32) -> array<vec4<f32>, 8> {
  let q = {{ w }}_q[c];
  let dm = unpack2x16float({{ w }}_s[c]);
  let low = q & vec4<u32>(0x0f0f0f0fu);
  let high = (q >> vec4<u32>(4u)) & vec4<u32>(0x0f0f0f0fu);
  return array<vec4<f32>, 8>(
  # for half in ("low", "high")
  # set last = loop.last
  # for i in "xyzw"
    dm.x * vec4<f32>(unpack4xU8({{ half }}.{{ i }})) + dm.y{{ "," if not (last and loop.last) }}
  # endfor
  # endfor
  );
}
# endmacro

# macro repack(bind)
{{ bind("q", "vec4<u32>", "read_write") }}
{{ bind("s", "u32", "read_write") }}

fn repack(c: u32, dst: u32) {
  let at = c * 20u;
  s[dst] = word(at);
  q[dst] = words(at + 4u);
}
# endmacro
