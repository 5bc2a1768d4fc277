// y[m] = f16(v[m] / (64 * scale[m])), v[m] = x[m], or with `norm` x[m] / sqrt(mean(x[m]^2) + eps) * weight; scale[m] a power of
// two: rows for the matrix units, whose f16 ends at 65504. The largest value of a row becomes 1 to 2, so what falls below
// f16's range is 2^-25 of it or less; weights come times 64 (lib/units.wgsl). Of every four values the second and the
// third change places, as there.
// step;  x (n_rows, k) f32;  [weight (k,) f32 with `norm`];  y (k / 8, rows, 8) f16, so that a tile of rows is read in one
// piece;  scale (n_rows,) f32
// With `gather`, row r is the row of x from which sequence r draws a token (left alone where it draws none).
// constants: k, rows, norm, eps, gather, per_seq (rows are sequences, not tokens), wg, subgroup, st;  grid: (n_rows, 1, 1)
# import "lib/reduce.wgsl" as lib
{{ "enable subgroups;" if subgroup }}
{{ bind("step", "u32") }}
{{ bind("x", "vec4<f32>") }}
# if norm
{{ bind("weight", "vec4<f32>") }}
# endif
{{ bind("y", "vec4<u32>", "read_write") }}
{{ bind("scale", "f32", "read_write") }}

{{ lib.workgroup_reduce("highest", "max", wg, subgroup) }}
# if norm
{{ lib.workgroup_reduce("sum", "add", wg, subgroup) }}
# endif

@compute @workgroup_size({{ wg }})
fn main(@builtin(workgroup_id) wid: vec3<u32>, @builtin(local_invocation_index) lid: u32) {
  if (wid.x >= step[{{ st.N_SEQS if per_seq or gather else st.N_ROWS }}]) {
    return;
  }
  # if gather
  let row = step[{{ st.seqs }}u + wid.x * {{ st.SEQ_WORDS }}u + {{ st.LOGITS_ROW }}u];
  if (row == 0xffffffffu) {
    return;
  }
  # else
  let row = wid.x;
  # endif
  let base = row * {{ k // 4 }}u;
  {# A thread keeps its values from the first pass to the second, eight at a time. #}
  # set n_items = (k // 8 + wg - 1) // wg
  # set n_whole = k // 8 // wg
  # for t in range(n_items)
  let at{{ t }} = {{ "min(lid + %du, %du)" % (t * wg, k // 8 - 1) if t >= n_whole else "lid + %du" % (t * wg) }};
  var a{{ t }} = x[base + 2u * at{{ t }}];
  var b{{ t }} = x[base + 2u * at{{ t }} + 1u];
  # endfor
  # if norm
  var squares = {% for t in range(n_whole) %}{{ " + " if t }}dot(a{{ t }}, a{{ t }}) + dot(b{{ t }}, b{{ t }}){% endfor %}{{ "0.0" if not n_whole }};
  # if n_items > n_whole
  squares += select(0.0, dot(a{{ n_whole }}, a{{ n_whole }}) + dot(b{{ n_whole }}, b{{ n_whole }}), lid < {{ k // 8 - n_whole * wg }}u);
  # endif
  # for t in range(n_items)
  a{{ t }} *= weight[2u * at{{ t }}];
  b{{ t }} *= weight[2u * at{{ t }} + 1u];
  # endfor
  # endif
  var most = abs(a0);
  # for t in range(n_items)
  most = max(most, max(abs(a{{ t }}), abs(b{{ t }})));
  # endfor
  let top = highest(max(max(most.x, most.y), max(most.z, most.w)), lid);
  # if norm
  let factor = inverseSqrt(sum(squares, lid) / {{ k }}.0 + {{ "%.9g" % eps }});
  # else
  let factor = 1.0;
  # endif
  // the exponent bits alone; not so small that its inverse overflows
  let power = clamp(bitcast<u32>(top * factor) & 0x7f800000u, 0x08000000u, 0x7e000000u);
  let times = factor * bitcast<f32>(0x7f000000u - power);
  # for t in range(n_items)
  {{ "if (lid < %du) " % (k // 8 - t * wg) if t >= n_whole }}{
    let a = a{{ t }} * times;
    let b = b{{ t }} * times;
    y[at{{ t }} * {{ rows }}u + wid.x] = vec4<u32>(pack2x16float(a.xz), pack2x16float(a.yw), pack2x16float(b.xz), pack2x16float(b.yw));
  }
  # endfor
  if (lid == 0u) {
    scale[wid.x] = bitcast<f32>(power) / 64.0;
  }
}
