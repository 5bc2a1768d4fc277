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

{# Row m of x, normed with the weights `norm` if there are any, into `x_own` of `lib/ints.wgsl`, by the whole workgroup. #}
# macro own_row(x, m, k, wg, subgroup, norm, eps, plane)
# set quads = k // 4
# if subgroup >= 8
# set batch = [(quads + wg - 1) // wg, 4 if not norm else quads] | min
  for (var first = 0u; first < {{ quads }}u; first += {{ batch * wg }}u) {
# for t in range(batch)
    let i{{ t }} = first + lid + {{ t * wg }}u;
    let x{{ t }} = {{ x }}[{{ m }} * {{ quads }}u + min(i{{ t }}, {{ quads - 1 }}u)];
# endfor
# if norm
    let all = {% for t in range(batch) %}select(0.0, dot(x{{ t }}, x{{ t }}), i{{ t }} < {{ quads }}u){{ " + " if not loop.last }}{% endfor %};
    let factor = inverseSqrt(sum(all, lid) / {{ k }}.0 + {{ "%.9g" % eps }});
# endif
# for t in range(batch)
    {
      let v = x{{ t }}{{ " * %s[min(i%d, %du)]" % (norm, t, quads - 1) if norm }};
{{ chunk_of_lanes() }}
      if (i{{ t }} < {{ quads }}u) {
        {{ x }}_own[(i{{ t }} & 7u) * {{ plane }}u + (i{{ t }} >> 3u)] = q;
        if ((i{{ t }} & 7u) == 0u) {
          {{ x }}_own[{{ 8 * plane }}u + (i{{ t }} >> 3u)] = bitcast<u32>(d{{ " * factor" if norm }});
          {{ x }}_own[{{ 9 * plane }}u + (i{{ t }} >> 3u)] = sums;
        }
      }
    }
# endfor
  }
# else
# if norm
  var squares = 0.0;
  for (var i = lid; i < {{ quads }}u; i += {{ wg }}u) {
    let v = {{ x }}[{{ m }} * {{ quads }}u + i];
    squares += dot(v, v);
  }
  let factor = inverseSqrt(sum(squares, lid) / {{ k }}.0 + {{ "%.9g" % eps }});
# endif
  for (var c = lid; c < {{ k // 32 }}u; c += {{ wg }}u) {
# for i in range(8)
    let v{{ i }} = {{ x }}[{{ m }} * {{ quads }}u + c * 8u + {{ i }}u]{{ " * %s[c * 8u + %du]" % (norm, i) if norm }};
# endfor
{{ chunk() }}
# for i in range(8)
    {{ x }}_own[c + {{ i * plane }}u] = q{{ i }};
# endfor
    {{ x }}_own[c + {{ 8 * plane }}u] = bitcast<u32>(d{{ " * factor" if norm }});
    {{ x }}_own[c + {{ 9 * plane }}u] = sums;
  }
# endif
  workgroupBarrier();
# endmacro

{# A chunk made by `chunk()` as chunk c of a row that begins at vec2 `row` of the binding `out`. #}
# macro write(out, row, c, k, factor="")
  {{ out }}[{{ row }} + 2u * {{ c }}] = vec2<u32>(q0, q1);
  {{ out }}[{{ row }} + 2u * {{ c }} + 1u] = vec2<u32>(q2, q3);
  {{ out }}[{{ row }} + 2u * {{ c }} + {{ k // 16 }}u] = vec2<u32>(q4, q5);
  {{ out }}[{{ row }} + 2u * {{ c }} + {{ k // 16 + 1 }}u] = vec2<u32>(q6, q7);
  {{ out }}[{{ row }} + {{ c }} + {{ k // 8 }}u] = vec2<u32>(bitcast<u32>(d{{ factor }}), sums);
# endmacro
