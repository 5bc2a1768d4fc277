{# IQ4_XS: h is the raw 8-byte header of a 256-block: f16 d, high pairs of the scales of 8 chunks, their low nibbles; q
   holds nibbles, indices into a codebook. weight = d * (scale - 32) * codebook[nibble]. #}
# import "quant/lib_codebook.wgsl" as codebook
# macro decode(w, bind)
{{ bind(w ~ "_h", "vec2<u32>") }}
{{ bind(w ~ "_q", "vec4<u32>") }}

{{ codebook.lookup(w, "iq4") }}

fn {{ w }}_decode(c: u32) -> array<vec4<f32>, 8> {
  let q = {{ w }}_q[c];
  let h = {{ w }}_h[c >> 3u];
  let j = c & 7u;
  let scale = ((h.y >> (4u * j)) & 15u) | (((h.x >> (16u + 2u * j)) & 3u) << 4u);
  let d = unpack2x16float(h.x).x * (f32(scale) - 32.0);
{{ codebook.chunk(w, "q", ("d", "d")) }}
}
# endmacro

# macro repack(bind)
{{ bind("h", "vec2<u32>", "read_write") }}
{{ bind("q", "vec4<u32>", "read_write") }}

fn repack(c: u32, dst: u32) {
  let at = (c >> 3u) * 136u;
  let j = c & 7u;
  if (j == 0u) {
    h[dst >> 3u] = vec2<u32>(word(at), word(at + 4u));
  }
  q[dst] = words(at + 8u + 16u * j);
}
# endmacro
