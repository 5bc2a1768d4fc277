{# The header of a 256-block of Q4_K or Q5_K: x = f16 d, f16 dmin; the 6-bit scales and minima of its 8 chunks by nibbles:
   y low bits of the scales, z low bits of the minima, w high two bits of the scale, then of the minimum. #}

{# (d * scale, dmin * minimum) of chunk j (0..7). #}
# macro scale_min(w)
fn {{ w }}_scale_min(header: vec4<u32>, j: u32) -> vec2<f32> {
  let at = header.yzw >> vec3<u32>(4u * j);
  let scale = (at.x & 15u) | ((at.z & 3u) << 4u);
  let minimum = (at.y & 15u) | ((at.z & 12u) << 2u);
  return unpack2x16float(header.x) * vec2<f32>(f32(scale), f32(minimum));
}
# endmacro

{# For repack: of ggml's header. Of its 12 bytes after d and dmin, byte j < 4 holds scale j in its low six bits and byte 4 + j
   minimum j; byte 8 + j the low nibbles of scale and minimum 4 + j, whose high bits are the top bits of bytes j and 4 + j. #}
# macro header()
fn packed_header(header: vec4<u32>) -> vec4<u32> {
  var result = vec4<u32>(header.x, 0u, 0u, 0u);
  for (var j = 0u; j < 4u; j++) {
    let at = header.yzw >> vec3<u32>(8u * j);
    let pairs = ((at.xx >> vec2<u32>(4u, 6u)) & vec2<u32>(3u)) | (((at.yy >> vec2<u32>(4u, 6u)) & vec2<u32>(3u)) << vec2<u32>(2u));
    result.y |= ((at.x & 15u) << (4u * j)) | ((at.z & 15u) << (4u * j + 16u));
    result.z |= ((at.y & 15u) << (4u * j)) | (((at.z >> 4u) & 15u) << (4u * j + 16u));
    result.w |= (pairs.x << (4u * j)) | (pairs.y << (4u * j + 16u));
  }
  return result;
}
# endmacro
