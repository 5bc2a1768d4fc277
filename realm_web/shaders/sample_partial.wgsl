// The largest logit of each of `parts` slices of the vocabulary, and its lowest token id.
// step;  logits (n_seqs, n_vocab) f32;  best (n_seqs, parts, 2) u32: float bits of the logit, token id
// constants: n_vocab, parts, wg, st;  grid: (parts, n_seqs, 1)
{{ bind("step", "u32") }}
{{ bind("logits", "f32") }}
{{ bind("best", "vec2<u32>", "read_write") }}
# set slice = (n_vocab + parts - 1) // parts

var<workgroup> tops: array<f32, {{ wg }}>;
var<workgroup> ids: array<u32, {{ wg }}>;

@compute @workgroup_size({{ wg }})
fn main(@builtin(workgroup_id) wid: vec3<u32>, @builtin(local_invocation_index) lid: u32) {
  if (wid.y >= step[{{ st.N_SEQS }}]) {
    return;
  }
  let end = min((wid.x + 1u) * {{ slice }}u, {{ n_vocab }}u);
  var top = -3.4e38;
  var token = 0xffffffffu;
  for (var i = wid.x * {{ slice }}u + lid; i < end; i += {{ wg }}u) {
    let v = logits[wid.y * {{ n_vocab }}u + i];
    if (v > top) {
      top = v;
      token = i;
    }
  }
  tops[lid] = top;
  ids[lid] = token;
  for (var stride = {{ wg // 2 }}u; stride > 0u; stride >>= 1u) {
    workgroupBarrier();
    if (lid < stride) {
      let other = tops[lid + stride];
      if (other > tops[lid] || (other == tops[lid] && ids[lid + stride] < ids[lid])) {
        tops[lid] = other;
        ids[lid] = ids[lid + stride];
      }
    }
  }
  if (lid == 0u) {
    best[wid.y * {{ parts }}u + wid.x] = vec2<u32>(bitcast<u32>(tops[0]), ids[0]);
  }
}
