// out[r] = x[r] / sqrt(mean(x[r]^2) + eps) * weight, added to out with `residual`
// step;  x (n_rows, dim) f32;  weight (dim,) f32;  out (n_rows, dim) f32
// With `gather`, row r of the output is the row of x from which sequence r draws a token (left alone where it draws none).
// With `ints` out is in 8 bits (lib/ints.wgsl). With `then` what became of out is normed once more, with then_weight (dim,) f32,
// into rows of lib/ints.wgsl, bound last.
// A thread keeps its values; no load waits for another, so rows that are not there are read too.
// constants: dim, eps, gather, residual, ints, then, wg, subgroup, st;  grid: (n_rows, 1, 1)
# import "lib/reduce.wgsl" as lib
# import "lib/quantise.wgsl" as quantise
# set quads = dim // 4
{{ "enable subgroups;" if subgroup }}
{{ bind("step", "u32") }}
{{ bind("x", "vec4<f32>") }}
{{ bind("weight", "vec4<f32>") }}
{{ bind("out", "u32" if ints else "vec4<f32>", "read_write") }}
# if then
{{ bind("then_weight", "vec4<f32>") }}
{{ bind("rows", "u32", "read_write") }}
# endif
{{ quantise.functions() if ints or then }}

{{ lib.workgroup_reduce("sum", "add", wg, subgroup, once=not then) }}

@compute @workgroup_size({{ wg }})
fn main(@builtin(workgroup_id) wid: vec3<u32>, @builtin(local_invocation_index) lid: u32) {
  # if gather
  let row = step[{{ st.seqs }}u + wid.x * {{ st.SEQ_WORDS }}u + {{ st.LOGITS_ROW }}u];
  let live = wid.x < step[{{ st.N_SEQS }}] && row != 0xffffffffu;
  let base = select(0u, row, live) * {{ quads }}u;
  # else
  let live = wid.x < step[{{ st.N_ROWS }}];
  let base = wid.x * {{ quads }}u;
  # endif
  # if ints
  let to = wid.x * {{ 3 * dim // 8 }}u;
{{ quantise.row("x", "base", dim, wg, subgroup, "weight", eps, {"name": "out", "to": "to", "k": dim}, live="live") }}
  # else
  # set items = (quads + wg - 1) // wg
  # for t in range(items)
  let i{{ t }} = {{ "lid + %du" % (t * wg) if (t + 1) * wg <= quads else "min(lid + %du, %du)" % (t * wg, quads - 1) }};
  let x{{ t }} = x[base + i{{ t }}];
  let weight{{ t }} = weight[i{{ t }}];
  # if residual
  let before{{ t }} = out[wid.x * {{ quads }}u + i{{ t }}];
  # endif
  # endfor
  var squares = 0.0;
  # for t in range(items)
  squares += {{ "dot(x%d, x%d)" % (t, t) if (t + 1) * wg <= quads else "select(0.0, dot(x%d, x%d), lid < %du)" % (t, t, quads - t * wg) }};
  # endfor
  let factor = inverseSqrt(sum(squares, lid) / {{ dim }}.0 + {{ "%.9g" % eps }});
  # for t in range(items)
  # set here = "lid < %du" % (quads - t * wg) if (t + 1) * wg > quads else "true"
  let y{{ t }} = {{ "before%d + " % t if residual }}x{{ t }} * factor * weight{{ t }};
  if (live && {{ here }}) {
    out[wid.x * {{ quads }}u + i{{ t }}] = y{{ t }};
  }
  # if then
  {{ "var then_squares = 0.0;" if t == 0 }}
  then_squares += select(0.0, dot(y{{ t }}, y{{ t }}), {{ here }});
  # endif
  # endfor
  # if then
  let then_factor = inverseSqrt(sum(then_squares, lid) / {{ dim }}.0 + {{ "%.9g" % eps }});
  let to = wid.x * {{ 3 * dim // 8 }}u;
  # for t in range(items)
  {
    let v = y{{ t }} * then_weight[i{{ t }}];
{{ quantise.chunk_of_lanes() }}
    if (live && lid + {{ t * wg }}u < {{ quads }}u) {
{{ quantise.put_lane({"name": "rows", "to": "to", "k": dim}, "i%d" % t, " * then_factor") }}
    }
  }
  # endfor
  # endif
  # endif
}
