{# Q4_1: q as Q4_0; s holds f16 d (low half) and f16 m (high half): weight = d * nibble + m. #}
# set offset, halves, minimum = 0, false, "chunk"
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
  let dm = unpack2x16float(raw.s);
  return Ints(low, high, dm.xx, -dm.yy);
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
