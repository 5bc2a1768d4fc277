// out[r] = x[r] / sqrt(mean(x[r]^2) + eps) * weight, added to out with `residual`
// step;  x (n_rows, dim) f32;  weight (dim,) f32;  out (n_rows, dim) f32
// With `gather`, row r of the output is the row of x from which sequence r draws a token (0 where it draws none).
// With `ints` out is in 8 bits (lib/ints.wgsl).
// constants: dim, eps, gather, residual, ints, wg, subgroup, st;  grid: (n_rows, 1, 1)
# import "lib/reduce.wgsl" as lib
# import "lib/quantise.wgsl" as quantise
{{ "enable subgroups;" if subgroup }}
{{ bind("step", "u32") }}
{{ bind("x", "vec4<f32>") }}
{{ bind("weight", "vec4<f32>") }}
{{ bind("out", "u32" if ints else "vec4<f32>", "read_write") }}
{{ quantise.functions() if ints }}

{{ lib.workgroup_reduce("sum", "add", wg, subgroup) }}

@compute @workgroup_size({{ wg }})
fn main(@builtin(workgroup_id) wid: vec3<u32>, @builtin(local_invocation_index) lid: u32) {
  # if gather
  if (wid.x >= step[{{ st.N_SEQS }}]) {
    return;
  }
  let row = step[{{ st.seqs }}u + wid.x * {{ st.SEQ_WORDS }}u + {{ st.LOGITS_ROW }}u];
  if (row == 0xffffffffu) {
    return;
  }
  # else
  let row = wid.x;
  if (row >= step[{{ st.N_ROWS }}]) {
    return;
  }
  # endif
  let base = row * {{ dim // 4 }}u;
  # if ints
  let to = wid.x * {{ 3 * dim // 8 }}u;
{{ quantise.row("x", "base", dim, wg, subgroup, "weight", eps, {"name": "out", "to": "to", "k": dim}) }}
  # else
  var squares = 0.0;
  for (var i = lid; i < {{ dim // 4 }}u; i += {{ wg }}u) {
    let v = x[base + i];
    squares += dot(v, v);
  }
  let factor = inverseSqrt(sum(squares, lid) / {{ dim }}.0 + {{ "%.9g" % eps }});
  for (var i = lid; i < {{ dim // 4 }}u; i += {{ wg }}u) {
    let at = wid.x * {{ dim // 4 }}u + i;
    out[at] = {{ "out[at] + " if residual }}x[base + i] * factor * weight[i];
  }
  # endif
}
