// out[r, i] = act(x[r, i]) * x[r, dim + i]: gate and up side by side. x (n_rows, 2 * dim) f32, out (n_rows, dim) f32
// For layers whose gate and up matrices are of different formats or have biases; else the matrix kernels do it.
// A token has `times` rows.
// step;  x;  out
// constants: act ("silu_mul", "gelu_mul", "swiglu_oai"), dim, times, st;  grid: (ceil(n_rows * dim / 4 / 64), 1, 1)
# import "lib/act.wgsl" as acts
{{ bind("step", "u32") }}
{{ bind("x", "vec4<f32>") }}
{{ bind("out", "vec4<f32>", "read_write") }}

@compute @workgroup_size(64)
fn main(@builtin(global_invocation_id) id: vec3<u32>) {
  let row = id.x / {{ dim // 4 }}u;
  let i = id.x % {{ dim // 4 }}u;
  if (row >= step[{{ st.N_ROWS }}] * {{ times }}u) {
    return;
  }
  let gate = x[row * {{ dim // 2 }}u + i];
  let up = x[row * {{ dim // 2 }}u + {{ dim // 4 }}u + i];
  out[id.x] = {{ acts.gated(act, "gate", "up", "vec4<f32>") }};
}
