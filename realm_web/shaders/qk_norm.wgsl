// RMS norm of q and of k in place, each over all of its heads (OLMo 2); norms of single heads are done with the rotation.
// step;  qkv (n_rows, stride) f32;  q_weight (len_q,) f32;  k_weight (len_k,) f32
// constants: len_q, len_k, stride, eps, wg, subgroup, st;  grid: (2, n_rows, 1)
# import "lib/reduce.wgsl" as lib
{{ "enable subgroups;" if subgroup }}
{{ bind("step", "u32") }}
{{ bind("qkv", "f32", "read_write") }}
{{ bind("q_weight", "f32") }}
{{ bind("k_weight", "f32") }}

{{ lib.workgroup_reduce("sum", "add", wg, subgroup) }}

@compute @workgroup_size({{ wg }})
fn main(@builtin(workgroup_id) wid: vec3<u32>, @builtin(local_invocation_index) lid: u32) {
  if (wid.y >= step[{{ st.N_ROWS }}]) {
    return;
  }
  let is_q = wid.x == 0u;
  let length = select({{ len_k }}u, {{ len_q }}u, is_q);
  let base = wid.y * {{ stride }}u + select({{ len_q }}u, 0u, is_q);
  var squares = 0.0;
  for (var i = lid; i < length; i += {{ wg }}u) {
    let v = qkv[base + i];
    squares += v * v;
  }
  let scale = inverseSqrt(sum(squares, lid) / f32(length) + {{ "%.9g" % eps }});
  for (var i = lid; i < length; i += {{ wg }}u) {
    let w = select(k_weight[min(i, {{ len_k - 1 }}u)], q_weight[min(i, {{ len_q - 1 }}u)], is_q);
    qkv[base + i] = qkv[base + i] * scale * w;
  }
}
