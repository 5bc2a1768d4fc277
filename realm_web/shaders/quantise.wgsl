// Rows of float32 to activations of 8 bits (lib/ints.wgsl): a thread per vector of 4 where subgroups are 8 or larger, else per
// chunk of 32.
// step;  x (n_rows * times, k) f32;  out (n_rows * times) rows of lib/ints.wgsl
// constants: k, times (rows of x to a row of the step), per_seq (or to a sequence), subgroup, st
// grid: (ceil(threads of a row / 64), rows, 1)
# import "lib/quantise.wgsl" as quantise
{{ "enable subgroups;" if subgroup >= 8 }}
{{ bind("step", "u32") }}
{{ bind("x", "vec4<f32>") }}
{{ bind("out", "u32", "read_write") }}

{{ quantise.functions() }}

@compute @workgroup_size(64)
fn main(@builtin(workgroup_id) wid: vec3<u32>, @builtin(local_invocation_index) lid: u32) {
  if (wid.y >= step[{{ st.N_SEQS if per_seq else st.N_ROWS }}]{{ " * %du" % times if times > 1 }}) {
    return;
  }
  let i = wid.x * 64u + lid;
  let to = wid.y * {{ 3 * k // 8 }}u;
  # set target = {"name": "out", "to": "to", "k": k}
  # if subgroup >= 8
  let v = x[wid.y * {{ k // 4 }}u + min(i, {{ k // 4 - 1 }}u)];
{{ quantise.chunk_of_lanes() }}
  if (i < {{ k // 4 }}u) {
{{ quantise.put_lane(target, "i", "") }}
  }
  # else
  if (i >= {{ k // 32 }}u) {
    return;
  }
  # for j in range(8)
  let v{{ j }} = x[wid.y * {{ k // 4 }}u + i * 8u + {{ j }}u];
  # endfor
{{ quantise.chunk() }}
{{ quantise.put_chunk(target, "i", "") }}
  # endif
}
