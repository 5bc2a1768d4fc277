// The experts of each token: the n_used with the largest router logits (ties to the lower id), best first, and how
// much each counts: its softmax among all experts, or among the chosen ones with `renormalise`.
// step;  logits (n_rows, n_experts) f32;  routes (n_rows, n_used) vec2<u32>: expert, bits of its f32 weight
// A thread ranks an expert by counting those before it, so that no expert waits for another's turn.
// constants: n_experts, n_used, renormalise, wg, st;  grid: (n_rows, 1, 1)
{{ bind("step", "u32") }}
{{ bind("logits", "f32") }}
{{ bind("routes", "vec2<u32>", "read_write") }}

var<workgroup> scores: array<f32, {{ n_experts }}>;
var<workgroup> chosen: array<f32, {{ n_used }}>;

@compute @workgroup_size({{ wg }})
fn main(@builtin(workgroup_id) wid: vec3<u32>, @builtin(local_invocation_index) lid: u32) {
  if (wid.x >= step[{{ st.N_ROWS }}]) {
    return;
  }
  for (var e = lid; e < {{ n_experts }}u; e += {{ wg }}u) {
    scores[e] = logits[wid.x * {{ n_experts }}u + e];
  }
  workgroupBarrier();
  for (var e = lid; e < {{ n_experts }}u; e += {{ wg }}u) {
    let mine = scores[e];
    var rank = 0u;
    for (var i = 0u; i < {{ n_experts }}u; i++) {
      rank += select(0u, 1u, scores[i] > mine || (scores[i] == mine && i < e));
    }
    if (rank < {{ n_used }}u) {
      chosen[rank] = mine;
      routes[wid.x * {{ n_used }}u + rank].x = e;
    }
  }
  workgroupBarrier();
  if (lid < {{ n_used }}u) {
    var sum = 0.0;
    # if renormalise
    for (var i = 0u; i < {{ n_used }}u; i++) {
      sum += exp(chosen[i] - chosen[0]);
    }
    # else
    for (var i = 0u; i < {{ n_experts }}u; i++) {
      sum += exp(scores[i] - chosen[0]);
    }
    # endif
    routes[wid.x * {{ n_used }}u + lid].y = bitcast<u32>(exp(chosen[lid] - chosen[0]) / sum);
  }
}
