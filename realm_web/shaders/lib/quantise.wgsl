{# Float32 activations to bytes, as `lib/ints.wgsl` has them: d = max |x| / 127 of 32 values, byte = round(x / d). #}

# macro functions()
{# Maxima are taken of the bits, so that a NaN is the largest. #}
fn largest(v: vec4<f32>) -> u32 {
  let bits = bitcast<vec4<u32>>(v) & vec4<u32>(0x7fffffffu);
  return max(max(bits.x, bits.y), max(bits.z, bits.w));
}

fn per_d(top: u32) -> f32 {
  return select(0.0, 127.0 / bitcast<f32>(top), top > 0x0da24260u);  // 1e-30
}

fn rounded(v: vec4<f32>, scale: f32) -> u32 {
  return pack4xI8(vec4<i32>(round(v * scale)));
}

fn sum_of(word: u32) -> i32 {
  return dot4I8Packed(word, 0x01010101u);
}

fn sums_word(a: i32, b: i32) -> u32 {
  return (bitcast<u32>(a) & 0xffffu) | (bitcast<u32>(b) << 16u);
}
# endmacro

{# Of a chunk in v0 to v7: the bytes in q0 to q7, their sums in `sums`, d in `d`. #}
# macro chunk()
  let top = max(
    max(max(largest(v0), largest(v1)), max(largest(v2), largest(v3))),
    max(max(largest(v4), largest(v5)), max(largest(v6), largest(v7)))
  );
  let d = bitcast<f32>(top) / 127.0;
  let scale = per_d(top);
# for i in range(8)
  let q{{ i }} = rounded(v{{ i }}, scale);
# endfor
  let sums = sums_word(sum_of(q0) + sum_of(q1) + sum_of(q2) + sum_of(q3), sum_of(q4) + sum_of(q5) + sum_of(q6) + sum_of(q7));
# endmacro

{# Of a chunk spread over 8 lanes, a vector v in each: its byte word `q`, and in the first lane of the 8 the sums, d. #}
# macro chunk_of_lanes()
  var top = largest(v);
# for i in (1, 2, 4)
  top = max(top, subgroupShuffleXor(top, {{ i }}u));
# endfor
  let d = bitcast<f32>(top) / 127.0;
  let q = rounded(v, per_d(top));
  var half = sum_of(q);
  half += subgroupShuffleXor(half, 1u);
  half += subgroupShuffleXor(half, 2u);
  let sums = sums_word(half, subgroupShuffleXor(half, 4u));
# endmacro
