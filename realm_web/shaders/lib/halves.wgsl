{# Rows of float32 as float16 for the matrix units, whose f16 ends at 65504: y[m] = f16(v[m] / (64 * scale[m])), scale[m] a
   power of two. The largest value of a row becomes 1 to 2, so what falls below f16's range is 2^-25 of it or less; weights come
   times 64 (lib/units.wgsl). Of every four values the second and the third change places, as there. y is (k / 8, rows, 8), so
   that a tile of rows is read in one piece; here it is bound as vec2<u32>, four values. #}

{# Of the largest value before it is multiplied with `factor`: `power`, and `to_one`, what values are multiplied with. #}
# macro power(top)
  let top = {{ top }};
  // the exponent bits alone; not so small that its inverse overflows
  let power = clamp(bitcast<u32>(top * factor) & 0x7f800000u, 0x08000000u, 0x7e000000u);
  let to_one = factor * bitcast<f32>(0x7f000000u - power);
# endmacro

# macro scale()
bitcast<f32>(power) / 64.0
# endmacro

{# Where the i-th four values of row m are. #}
# macro place(i, m, rows)
(({{ i }} >> 1u) * {{ rows }}u + {{ m }}) * 2u + ({{ i }} & 1u)
# endmacro

# macro packed(v)
vec2<u32>(pack2x16float(({{ v }}).xz), pack2x16float(({{ v }}).yw))
# endmacro

{# What kernels of a row end in: a thread's values v0, v1... times `factor` to y, the row's scale to scale. Values stand at
   at0, at1... of `quads`; those beyond the row repeat its last. Needs m, live, lid and the reduction `highest`. #}
# macro store(items, quads, rows)
  var most = abs(v0);
  # for i in range(1, items)
  most = max(most, abs(v{{ i }}));
  # endfor
{{ power("highest(max(max(most.x, most.y), max(most.z, most.w)), lid)") }}
  # for i in range(items)
  if (live && at{{ i }} < {{ quads }}u) {
    y[{{ place("at%d" % i, "m", rows) }}] = {{ packed("v%d * to_one" % i) }};
  }
  # endfor
  if (live && lid == 0u) {
    scale[m] = {{ scale() }};
  }
# endmacro
