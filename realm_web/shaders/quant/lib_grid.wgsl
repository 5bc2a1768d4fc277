{# What the formats with a grid share. #}

{# v with the signs of bits 0 to 3 of s (1: negative). #}
# macro signed(w)
fn {{ w }}_signed(v: vec4<f32>, s: u32) -> vec4<f32> {
  let top = (vec4<u32>(s) << vec4<u32>(31u, 30u, 29u, 28u)) & vec4<u32>(0x80000000u);
  return bitcast<vec4<f32>>(bitcast<vec4<u32>>(v) ^ top);
}
# endmacro

{# Eight signs from seven: an even number is negative. #}
# macro even(w)
fn {{ w }}_even(seven: u32) -> u32 {
  return seven | ((countOneBits(seven) & 1u) << 7u);
}
# endmacro

{# Rows of 8 magnitudes: t0 to t3 times scales[0 or 1], with the sign bytes s0 to s3. #}
# macro rows_of_8(w, scales)
  return array<vec4<f32>, 8>(
  # for i in range(8)
    {{ w }}_signed({{ scales[i // 4] }} * vec4<f32>(unpack4xU8(t{{ i // 2 }}.{{ "xy"[i % 2] }})), s{{ i // 2 }} >> {{ 4 * (i % 2) }}u){{ "," if not loop.last }}
  # endfor
  );
# endmacro

{# Rows of 4 magnitudes: t0 to t7 times d, with the sign bytes s0 to s3. #}
# macro rows_of_4(w, d)
  return array<vec4<f32>, 8>(
  # for i in range(8)
    {{ w }}_signed({{ d }} * vec4<f32>(unpack4xU8(t{{ i }})), s{{ i // 2 }} >> {{ 4 * (i % 2) }}u){{ "," if not loop.last }}
  # endfor
  );
# endmacro

{# Rows of 8 of -1, 0, 1: (t0 to t3 + d0 to d3) * scales[0 or 1]. #}
# macro rows_of_iq1(scales)
  return array<vec4<f32>, 8>(
  # for i in range(8)
    {{ scales[i // 4] }} * (vec4<f32>(unpack4xI8(t{{ i // 2 }}.{{ "xy"[i % 2] }})) + d{{ i // 2 }}){{ "," if not loop.last }}
  # endfor
  );
# endmacro
