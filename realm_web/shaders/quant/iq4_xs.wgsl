{# IQ4_XS: h is the raw 8-byte header of a 256-block: f16 d, high pairs of the scales of 8 chunks, their low nibbles; q
   holds pairs of indices into a codebook. weight = d * (scale - 32) * codebook[nibble]. #}
# import "quant/lib_codebook.wgsl" as codebook
# set offset, halves, minimum = 0, false, none
# set table = true
# macro ints(w, bind, wg, room)
{{ bind(w ~ "_h", "vec2<u32>") }}
{{ bind(w ~ "_q", "vec4<u32>") }}

{{ codebook.lookup(w, "iq4", wg, room) }}

struct {{ w }}_Raw {
  h: vec2<u32>,
  q: vec4<u32>,
}

fn {{ w }}_fetch(c: u32) -> {{ w }}_Raw {
  return {{ w }}_Raw({{ w }}_h[c >> 3u], {{ w }}_q[c]);
}

fn {{ w }}_ints(raw: {{ w }}_Raw, c: u32) -> Ints {
  let q = {{ w }}_halves(raw.q, c);
  let j = c & 7u;
  let scale = ((raw.h.y >> (4u * j)) & 15u) | (((raw.h.x >> (16u + 2u * j)) & 3u) << 4u);
  return Ints(q[0], q[1], vec2<f32>(unpack2x16float(raw.h.x).x * (f32(scale) - 32.0)), vec2<f32>());
}
# endmacro

# macro repack(bind)
{{ bind("h", "vec2<u32>", "read_write") }}
{{ bind("q", "vec4<u32>", "read_write") }}

{{ codebook.in_order() }}

fn repack(c: u32, dst: u32) {
  let at = (c >> 3u) * 136u;
  let j = c & 7u;
  if (j == 0u) {
    h[dst >> 3u] = vec2<u32>(word(at), word(at + 4u));
  }
  let v = words(at + 8u + 16u * j);
  q[dst] = vec4<u32>(eights(v), eights(v >> vec4<u32>(4u)));  // ggml: weight i low, weight i + 16 high
}
# endmacro
