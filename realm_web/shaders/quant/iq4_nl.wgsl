{# IQ4_NL: q holds pairs of indices into a codebook, s the f16 d: weight = d * codebook[nibble]. #}
# import "quant/lib_codebook.wgsl" as codebook
# set offset, halves, minimum = 0, false, none
# set table = true
# macro ints(w, bind, wg, room)
{{ bind(w ~ "_q", "vec4<u32>") }}
{{ bind(w ~ "_s", "u32") }}

{{ codebook.lookup(w, "iq4", wg, room) }}

struct {{ w }}_Raw {
  q: vec4<u32>,
  s: u32,
}

fn {{ w }}_fetch(c: u32) -> {{ w }}_Raw {
  return {{ w }}_Raw({{ w }}_q[c], {{ w }}_s[c]);
}

fn {{ w }}_ints(raw: {{ w }}_Raw, c: u32) -> Ints {
  let q = {{ w }}_halves(raw.q, c);
  return Ints(q[0], q[1], vec2<f32>(unpack2x16float(raw.s).x), vec2<f32>());
}
# endmacro

# macro repack(bind)
{{ bind("q", "vec4<u32>", "read_write") }}
{{ bind("s", "u32", "read_write") }}

{{ codebook.in_order() }}

fn repack(c: u32, dst: u32) {
  let at = c * 18u;
  s[dst] = half_at(at);
  let v = words(at + 2u);
  q[dst] = vec4<u32>(eights(v), eights(v >> vec4<u32>(4u)));  // ggml: weight i low, weight i + 16 high
}
# endmacro
