// The parts of `attention` with splits > 1 made whole: each split weighted by exp(its maximum - the largest).
// step;  parts (n_rows, n_heads, splits, head_dim + 2) f32;  out (n_rows, n_heads * head_dim) f32
// [sinks (n_heads,) f32] as in attention
// constants: n_heads, head_dim, splits, sinks, st;  grid: (n_heads, n_rows, 1)
# set vp = head_dim // 2
{{ bind("step", "u32") }}
{{ bind("parts", "vec2<f32>") }}
# if sinks
{{ bind("sinks", "f32") }}
# endif
{{ bind("out", "vec2<f32>", "read_write") }}

@compute @workgroup_size(64)
fn main(@builtin(workgroup_id) wid: vec3<u32>, @builtin(local_invocation_index) lid: u32) {
  if (wid.y >= step[{{ st.N_ROWS }}]) {
    return;
  }
  let head = wid.y * {{ n_heads }}u + wid.x;
  let base = head * {{ splits * (vp + 1) }}u;
  var top = {{ "sinks[wid.x]" if sinks else "-1e30" }};
  for (var s = 0u; s < {{ splits }}u; s++) {
    top = max(top, parts[base + s * {{ vp + 1 }}u + {{ vp }}u].x);
  }
  for (var pair = lid; pair < {{ vp }}u; pair += 64u) {
    var total = vec2<f32>();
    var sum = {{ "exp(sinks[wid.x] - top)" if sinks else "0.0" }};
    for (var s = 0u; s < {{ splits }}u; s++) {
      let at = base + s * {{ vp + 1 }}u;
      let stats = parts[at + {{ vp }}u];
      let w = exp(stats.x - top);
      total += w * parts[at + pair];
      sum += w * stats.y;
    }
    out[head * {{ vp }}u + pair] = total / sum;
  }
}
