{# Q5_1: q and s as Q4_1; h lanes of the fifth bit: weight = d * value + m. #}
# import "quant/lib_bits.wgsl" as bits
# set offset, halves, minimum = 0, false, "chunk"
# macro ints(w, bind)
{{ bind(w ~ "_q", "vec4<u32>") }}
{{ bind(w ~ "_s", "u32") }}
{{ bind(w ~ "_h", "u32") }}

struct {{ w }}_Raw {
  q: vec4<u32>,
  s: u32,
  h: u32,
}

fn {{ w }}_fetch(c: u32) -> {{ w }}_Raw {
  return {{ w }}_Raw({{ w }}_q[c], {{ w }}_s[c], {{ w }}_h[c]);
}

fn {{ w }}_ints(raw: {{ w }}_Raw, c: u32) -> Ints {
  let low = (raw.q & vec4<u32>(0x0f0f0f0fu)) | {{ bits.fifth("raw.h", 0) }};
  let high = ((raw.q >> vec4<u32>(4u)) & vec4<u32>(0x0f0f0f0fu)) | {{ bits.fifth("raw.h", 4) }};
  let dm = unpack2x16float(raw.s);
  return Ints(low, high, dm.xx, -dm.yy);
}
# endmacro

# macro repack(bind)
{{ bind("q", "vec4<u32>", "read_write") }}
{{ bind("s", "u32", "read_write") }}
{{ bind("h", "u32", "read_write") }}

{{ bits.lanes() }}

fn repack(c: u32, dst: u32) {
  let at = c * 24u;
  s[dst] = word(at);
  h[dst] = lanes(word(at + 4u));
  q[dst] = words(at + 8u);
}
# endmacro
