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

fn bytes_of(v: vec4<f32>, scale: f32) -> u32 {
  return pack4xI8(vec4<i32>(round(v * scale)));
}

fn sum_of(word: u32) -> i32 {
  return dot4I8Packed(word, 0x01010101u);
}
# endmacro

{# Of a chunk in v0 to v7: the bytes in q0 to q7, their sums by halves in `sums`, d in `d`. #}
# macro chunk()
  let top = max(
    max(max(largest(v0), largest(v1)), max(largest(v2), largest(v3))),
    max(max(largest(v4), largest(v5)), max(largest(v6), largest(v7)))
  );
  let d = bitcast<f32>(top) / 127.0;
  let scale = per_d(top);
# for i in range(8)
  let q{{ i }} = bytes_of(v{{ i }}, scale);
# endfor
  let sums = vec2<f32>(vec2<i32>(sum_of(q0) + sum_of(q1) + sum_of(q2) + sum_of(q3), sum_of(q4) + sum_of(q5) + sum_of(q6) + sum_of(q7)));
# endmacro

{# Of a chunk spread over 8 lanes, a vector v in each: its byte word `q`, d, and in the first four lanes the sums. #}
# macro chunk_of_lanes()
  var top = largest(v);
# for i in (1, 2, 4)
  top = max(top, subgroupShuffleXor(top, {{ i }}u));
# endfor
  let d = bitcast<f32>(top) / 127.0;
  let q = bytes_of(v, per_d(top));
  var half = sum_of(q);
  half += subgroupShuffleXor(half, 1u);
  half += subgroupShuffleXor(half, 2u);
  let sums = vec2<f32>(vec2<i32>(half, subgroupShuffleXor(half, 4u)));
# endmacro

{# Writes a word of chunk c: 0 to 7 are its bytes, 8 to 11 what belongs to them. The target is a dict: of a workgroup's own
   row {name, plane}, of a row of k that begins at word `to` of a binding of u32 {name, to, k}. #}
# macro put(target, word, c, value)
# if "plane" in target
{{ target.name }}[{{ c }} + {{ word * target.plane }}u] = {{ value }};
# else
{{ target.name }}[{{ target.to }} + {{ word // 4 * target.k // 8 + word % 4 }}u + 4u * {{ c }}] = {{ value }};
# endif
# endmacro

{# The same for byte word number (i & 7) of chunk i >> 3. #}
# macro put_quad(target, i, value)
# if "plane" in target
{{ target.name }}[({{ i }} >> 3u) + ({{ i }} & 7u) * {{ target.plane }}u] = {{ value }};
# else
{{ target.name }}[{{ target.to }} + select(0u, {{ target.k // 8 }}u, ({{ i }} & 4u) != 0u) + 4u * ({{ i }} >> 3u) + ({{ i }} & 3u)] = {{ value }};
# endif
# endmacro

{# What a lane writes after `chunk_of_lanes()`, of vector i of the row; and what a thread does after `chunk()`. #}
# macro put_lane(target, i, factor)
  {{ put_quad(target, i, "q") }}
{{ put_lane_scale(target, i, factor) }}
# endmacro

{# Of the words that belong to a chunk each of its first four lanes writes one. #}
# macro put_lane_scale(target, i, factor)
  if (({{ i }} & 4u) == 0u) {
    let which = {{ i }} & 3u;
    let times = select(select(sums.y, sums.x, which == 2u), select(sums.x + sums.y, 1.0, which == 0u), which < 2u);
    let word = bitcast<u32>(d{{ factor }} * times);
# if "plane" in target
    {{ target.name }}[({{ i }} >> 3u) + (which + 8u) * {{ target.plane }}u] = word;
# else
    {{ target.name }}[{{ target.to }} + {{ target.k // 4 }}u + 4u * ({{ i }} >> 3u) + which] = word;
# endif
  }
# endmacro

# macro put_chunk(target, c, factor)
# for i in range(8)
  {{ put(target, i, c, "q%d" % i) }}
# endfor
{{ put_scales(target, c, factor) }}
# endmacro

# macro put_scales(target, c, factor)
  let scale_of = d{{ factor }};
  {{ put(target, 8, c, "bitcast<u32>(scale_of)") }}
  {{ put(target, 9, c, "bitcast<u32>(scale_of * (sums.x + sums.y))") }}
  {{ put(target, 10, c, "bitcast<u32>(scale_of * sums.x)") }}
  {{ put(target, 11, c, "bitcast<u32>(scale_of * sums.y)") }}
# endmacro

{# A row of x that begins at vector `base`, normed with the weights `norm` if there are any, by the whole workgroup. Loads that
   `load` has issued already, in the same scope, are not repeated: so they can go ahead of others. Nothing is written unless
   `live`, a condition. #}
# macro row(x, base, k, wg, subgroup, norm, eps, target, loaded=false, live="")
# set quads = k // 4
# set factor = " * factor" if norm else ""
# set only = " && " ~ live if live else ""
# if subgroup >= 8
# set batch = batch_of(k, wg, norm) | int
# set once = batch * wg >= quads
# if not once
  for (var first = 0u; first < {{ quads }}u; first += {{ batch * wg }}u) {
# endif
# if not (loaded and once)
{{ load(x, base, k, wg, subgroup, norm) }}
# endif
# if norm
    let all = {% for t in range(batch) %}select(0.0, dot(x{{ t }}, x{{ t }}), i{{ t }} < {{ quads }}u){{ " + " if not loop.last }}{% endfor %};
    let factor = inverseSqrt(sum(all, lid) / {{ k }}.0 + {{ "%.9g" % eps }});
# endif
# for t in range(batch)
    {
      let v = x{{ t }}{{ " * norm%d" % t if norm }};
{{ chunk_of_lanes() }}
      if (i{{ t }} < {{ quads }}u{{ only }}) {
{{ put_lane(target, "i%d" % t, factor) }}
      }
    }
# endfor
# if not once
  }
# endif
# else
# if norm
  var squares = 0.0;
  for (var i = lid; i < {{ quads }}u; i += {{ wg }}u) {
    let v = {{ x }}[{{ base }} + i];
    squares += dot(v, v);
  }
  let factor = inverseSqrt(sum(squares, lid) / {{ k }}.0 + {{ "%.9g" % eps }});
# endif
  for (var c = lid; c < {{ k // 32 }}u{{ only }}; c += {{ wg }}u) {
# for i in range(8)
    let v{{ i }} = {{ x }}[{{ base }} + c * 8u + {{ i }}u]{{ " * %s[c * 8u + %du]" % (norm, i) if norm }};
# endfor
{{ chunk() }}
{{ put_chunk(target, "c", factor) }}
  }
# endif
# endmacro

{# Vectors that a thread takes at a time: all of its share where that is to be normed, or is small. #}
# macro batch_of(k, wg, norm)
# set share = (k // 4 + wg - 1) // wg
{{ share if norm or share <= 8 else 4 }}
# endmacro

# macro load(x, base, k, wg, subgroup, norm)
# set quads = k // 4
# if subgroup >= 8
# set batch = batch_of(k, wg, norm) | int
# set first = "" if batch * wg >= quads else "first + "
# for t in range(batch)
    let i{{ t }} = {{ first }}lid + {{ t * wg }}u;
    let x{{ t }} = {{ x }}[{{ base }} + min(i{{ t }}, {{ quads - 1 }}u)];
# if norm
    let norm{{ t }} = {{ norm }}[min(i{{ t }}, {{ quads - 1 }}u)];
# endif
# endfor
# endif
# endmacro
