// Rows of float32 to activations of 8 bits (lib/ints.wgsl): a thread per vector of 4 where subgroups are 8 or larger, else per
// chunk of 32. No load waits for another: a row that is not there is read all the same, and not written.
// step;  x (n_rows * times, k) f32;  out (n_rows * times) rows of lib/ints.wgsl
// constants: k, times (rows of x to a row of the step), per_seq (or to a sequence), wg, subgroup, st
// grid: (ceil(threads of a row / wg), rows, 1)
# import "lib/quantise.wgsl" as quantise
# set quads = k // 4
{{ "enable subgroups;" if subgroup >= 8 }}
{{ bind("step", "u32") }}
{{ bind("x", "vec4<f32>") }}
{{ bind("out", "u32", "read_write") }}

{{ quantise.functions() }}

@compute @workgroup_size({{ wg }})
fn main(@builtin(workgroup_id) wid: vec3<u32>, @builtin(local_invocation_index) lid: u32) {
  let live = wid.y < step[{{ st.N_SEQS if per_seq else st.N_ROWS }}]{{ " * %du" % times if times > 1 }};
  let i = wid.x * {{ wg }}u + lid;
  let base = wid.y * {{ quads }}u;
  let to = wid.y * {{ 3 * k // 8 }}u;
  # set target = {"name": "out", "to": "to", "k": k}
  # if subgroup >= 8
  let v = x[base + min(i, {{ quads - 1 }}u)];
{{ quantise.chunk_of_lanes() }}
  if (live && i < {{ quads }}u) {
{{ quantise.put_lane(target, "i", "") }}
  }
  # else
  if (!live || i >= {{ k // 32 }}u) {
    return;
  }
  # for j in range(8)
  let v{{ j }} = x[base + i * 8u + {{ j }}u];
  # endfor
{{ quantise.chunk() }}
{{ quantise.put_chunk(target, "i", "") }}
  # endif
}
