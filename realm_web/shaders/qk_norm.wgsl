// RMS norm of parts of q and k, in place: n_q slices of len_q elements, then n_k of len_k, each with its weight.
// One slice per head (Qwen 3, Gemma 3), or one for all heads (OLMo 2).
// step;  qkv (n_rows, stride) f32;  q_weight (len_q,) f32;  k_weight (len_k,) f32
// constants: n_q, len_q, n_k, len_k, stride, eps, wg, subgroup, st;  grid: (n_q + n_k, n_rows, 1)
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
  let is_q = wid.x < {{ n_q }}u;
  let length = select({{ len_k }}u, {{ len_q }}u, is_q);
  let start = select({{ n_q * len_q }}u + (wid.x - {{ n_q }}u) * {{ len_k }}u, wid.x * {{ len_q }}u, is_q);
  let base = wid.y * {{ stride }}u + start;
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
