// Rows of float32 to activations of 8 bits (lib/ints.wgsl): a thread takes `items` vectors of 4 where subgroups are 8 or
// larger, else a chunk of 32. No load waits for another: a row that is not there is read all the same, and not written.
// step;  x (n_rows * times, k) f32;  out (n_rows * times) rows of lib/ints.wgsl
// constants: k, times (rows of x to a row of the step), per_seq (or to a sequence), wg, items, subgroup, st
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
  let base = wid.y * {{ quads }}u;
  let to = wid.y * {{ 3 * k // 8 }}u;
  # set target = {"name": "out", "to": "to", "k": k}
  # if subgroup >= 8
  # for t in range(items)
  let i{{ t }} = wid.x * {{ wg * items }}u + lid + {{ t * wg }}u;
  let x{{ t }} = x[base + min(i{{ t }}, {{ quads - 1 }}u)];
  # endfor
  # for t in range(items)
  {
    let v = x{{ t }};
{{ quantise.chunk_of_lanes() }}
    if (live && i{{ t }} < {{ quads }}u) {
{{ quantise.put_lane(target, "i%d" % t, "") }}
    }
  }
  # endfor
  # else
  let i = wid.x * {{ wg }}u + lid;
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
