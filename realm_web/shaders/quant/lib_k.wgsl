{# The 6-bit scale and minimum of chunk j (0..7) of a Q4_K or Q5_K block, from its 16-byte header:
   x = f16 d, f16 dmin; y, z, w = 12 bytes. Returns (d * scale, dmin * minimum). #}
# macro scale_min(w)
fn {{ w }}_scale_min(header: vec4<u32>, j: u32) -> vec2<f32> {
  let shift = 8u * (j & 3u);
  let a = (header.y >> shift) & 0xffu;
  let b = (header.z >> shift) & 0xffu;
  let c = (header.w >> shift) & 0xffu;
  let first = j < 4u;
  let scale = select((c & 15u) | ((a >> 6u) << 4u), a & 63u, first);
  let minimum = select((c >> 4u) | ((b >> 6u) << 4u), b & 63u, first);
  return unpack2x16float(header.x) * vec2<f32>(f32(scale), f32(minimum));
}
# endmacro
