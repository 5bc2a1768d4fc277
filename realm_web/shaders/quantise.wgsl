// Rows of float32 to activations of 8 bits (lib/ints.wgsl): one thread per chunk of 32.
// step;  x (n_rows * times, k) f32;  out (n_rows * times) rows of lib/ints.wgsl
// constants: k, times (rows of x to a row of the step), per_seq (or to a sequence), st;  grid: (ceil(rows * k / 32 / 64), 1, 1)
# import "lib/ints.wgsl" as ints
# import "lib/quantise.wgsl" as quantise
{{ bind("step", "u32") }}
{{ bind("x", "vec4<f32>") }}
{{ bind("out", "vec2<u32>", "read_write") }}

{{ quantise.functions() }}

@compute @workgroup_size(64)
fn main(@builtin(global_invocation_id) id: vec3<u32>) {
  let row = id.x / {{ k // 32 }}u;
  let c = id.x % {{ k // 32 }}u;
  if (row >= step[{{ st.N_SEQS if per_seq else st.N_ROWS }}]{{ " * %du" % times if times > 1 }}) {
    return;
  }
  # for i in range(8)
  let v{{ i }} = x[id.x * 8u + {{ i }}u];
  # endfor
{{ quantise.chunk() }}
  let to = row * {{ 2 * (ints.row_vec4s(k) | int) }}u;
{{ quantise.write("out", "to", "c", k) }}
}
