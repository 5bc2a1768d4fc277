// Rows of float32 for the matrix units, as lib/halves.wgsl has them; with `norm` x / sqrt(mean(x^2) + eps) * weight.
// step;  x (n_rows, k) f32;  [weight (k,) f32 with `norm`];  y (k / 8, rows, 8) f16;  scale (n_rows,) f32
// With `gather`, row r is the row of x from which sequence r draws a token (left alone where it draws none).
// A thread keeps its values; no load waits for another, so rows that are not there are read too.
// constants: k, rows, norm, eps, gather, per_seq (rows are sequences, not tokens), wg, subgroup, st;  grid: (n_rows, 1, 1)
# import "lib/halves.wgsl" as halves
# import "lib/reduce.wgsl" as lib
# set quads = k // 4
# set items = (quads + wg - 1) // wg
{{ "enable subgroups;" if subgroup }}
{{ bind("step", "u32") }}
{{ bind("x", "vec4<f32>") }}
# if norm
{{ bind("weight", "vec4<f32>") }}
# endif
{{ bind("y", "vec2<u32>", "read_write") }}
{{ bind("scale", "f32", "read_write") }}

{{ lib.workgroup_reduce("highest", "max", wg, subgroup, once=true) }}
# if norm
{{ lib.workgroup_reduce("sum", "add", wg, subgroup, once=true) }}
# endif

@compute @workgroup_size({{ wg }})
fn main(@builtin(workgroup_id) wid: vec3<u32>, @builtin(local_invocation_index) lid: u32) {
  let m = wid.x;
  # if gather
  let row = step[{{ st.seqs }}u + m * {{ st.SEQ_WORDS }}u + {{ st.LOGITS_ROW }}u];
  let live = m < step[{{ st.N_SEQS }}] && row != 0xffffffffu;
  let base = select(0u, row, live) * {{ quads }}u;
  # else
  let live = m < step[{{ st.N_SEQS if per_seq else st.N_ROWS }}];
  let base = m * {{ quads }}u;
  # endif
  # for i in range(items)
  let at{{ i }} = lid + {{ i * wg }}u;
  let n{{ i }} = min(at{{ i }}, {{ quads - 1 }}u);
  var v{{ i }} = x[base + n{{ i }}];
  # if norm
  let weight{{ i }} = weight[n{{ i }}];
  # endif
  # endfor
  # if norm
  let squares = {% for i in range(items) %}select(0.0, dot(v{{ i }}, v{{ i }}), at{{ i }} < {{ quads }}u){{ " + " if not loop.last }}{% endfor %};
  let factor = inverseSqrt(sum(squares, lid) / {{ k }}.0 + {{ "%.9g" % eps }});
  # for i in range(items)
  v{{ i }} *= weight{{ i }};
  # endfor
  # else
  let factor = 1.0;
  # endif
{{ halves.store(items, quads, rows) }}
}
