{# NVFP4: q holds pairs of indices into a codebook of doubled values; s the halved scales as f16: of the chunk's first
   16 weights low, of its last 16 high. #}
# import "quant/lib_codebook.wgsl" as codebook
# set offset, halves, minimum = 0, true, none
# set table = true
# macro ints(w, bind, wg, room)
{{ bind(w ~ "_q", "vec4<u32>") }}
{{ bind(w ~ "_s", "u32") }}

{{ codebook.lookup(w, "fp4", wg, room) }}

struct {{ w }}_Raw {
  q: vec4<u32>,
  s: u32,
}

fn {{ w }}_fetch(c: u32) -> {{ w }}_Raw {
  return {{ w }}_Raw({{ w }}_q[c], {{ w }}_s[c]);
}

fn {{ w }}_ints(raw: {{ w }}_Raw, c: u32) -> Ints {
  let q = {{ w }}_halves(raw.q, c);
  return Ints(q[0], q[1], unpack2x16float(raw.s), vec2<f32>());
}
# endmacro

# macro repack(bind)
{{ bind("q", "vec4<u32>", "read_write") }}
{{ bind("s", "u32", "read_write") }}

{{ codebook.in_order() }}

// Unsigned E4M3 times a half: the top bit means nothing, 0x7f is zero. Exact as f16.
fn halved(x: u32) -> f32 {
  let exponent = (x >> 3u) & 15u;
  let mantissa = x & 7u;
  let normal = bitcast<f32>(((exponent + 119u) << 23u) | (mantissa << 20u));
  let value = select(normal, f32(mantissa) * 0.0009765625, exponent == 0u);
  return select(value, 0.0, x == 0x7fu);
}

fn repack(c: u32, dst: u32) {
  // ggml, for 64 weights: 4 scales, then 8 bytes for 16 weights each: weight i low, weight i + 8 high
  let at = (c >> 1u) * 36u;
  let j = c & 1u;
  s[dst] = pack2x16float(vec2<f32>(halved(byte(at + 2u * j)), halved(byte(at + 2u * j + 1u))));
  let v = words(at + 4u + 16u * j);
  let low = eights(v);
  let high = eights(v >> vec4<u32>(4u));
  q[dst] = vec4<u32>(low.x, high.x, low.y, high.y);
}
# endmacro
