// y[m] = f16(x[m] / (64 * scale[m])), scale[m] a power of two: rows for the matrix units, whose f16 ends at 65504.
// The largest value of a row becomes 1 to 2, so what falls below f16's range is 2^-25 of it or less; weights come times
// 64 (lib/units.wgsl). Of every four values the second and the third change places, as there.
// step;  x (n_rows, k) f32;  y (k / 8, rows, 8) f16, so that a tile of rows is read in one piece;  scale (n_rows,) f32
// constants: k, rows, per_seq (rows are sequences, not tokens), wg, subgroup, st;  grid: (n_rows, 1, 1)
# import "lib/reduce.wgsl" as lib
{{ "enable subgroups;" if subgroup }}
{{ bind("step", "u32") }}
{{ bind("x", "vec4<f32>") }}
{{ bind("y", "vec4<u32>", "read_write") }}
{{ bind("scale", "f32", "read_write") }}

{{ lib.workgroup_reduce("highest", "max", wg, subgroup) }}

@compute @workgroup_size({{ wg }})
fn main(@builtin(workgroup_id) wid: vec3<u32>, @builtin(local_invocation_index) lid: u32) {
  if (wid.x >= step[{{ st.N_SEQS if per_seq else st.N_ROWS }}]) {
    return;
  }
  let base = wid.x * {{ k // 4 }}u;
  var top = 0.0;
  for (var i = lid; i < {{ k // 4 }}u; i += {{ wg }}u) {
    let v = abs(x[base + i]);
    top = max(top, max(max(v.x, v.y), max(v.z, v.w)));
  }
  // the exponent bits alone; not so small that its inverse overflows
  let power = clamp(bitcast<u32>(highest(top, lid)) & 0x7f800000u, 0x08000000u, 0x7e000000u);
  let inverse = bitcast<f32>(0x7f000000u - power);
  for (var i = lid; i < {{ k // 8 }}u; i += {{ wg }}u) {
    let a = x[base + 2u * i] * inverse;
    let b = x[base + 2u * i + 1u] * inverse;
    y[i * {{ rows }}u + wid.x] = vec4<u32>(pack2x16float(a.xz), pack2x16float(a.yw), pack2x16float(b.xz), pack2x16float(b.yw));
  }
  if (lid == 0u) {
    scale[wid.x] = bitcast<f32>(power) / 64.0;
  }
}
