// scores[row] = log_softmax(logits)[target of the row], for the rows of one group
// step;  group u32: its step buffer (see row_scores_select.wgsl);  logits (group_rows, n_vocab) f32, of which the first
// n_valid are of tokens;  scores (max_rows,) f32
// constants: n_vocab, n_valid, wg, subgroup, st;  grid: (group_rows, 1, 1)
# import "lib/reduce.wgsl" as lib
{{ "enable subgroups;" if subgroup }}
{{ bind("step", "u32") }}
{{ bind("group", "u32") }}
{{ bind("logits", "f32") }}
{{ bind("scores", "f32", "read_write") }}

{{ lib.workgroup_reduce("largest", "max", wg, subgroup) }}
{{ lib.workgroup_reduce("sum", "add", wg, subgroup) }}

@compute @workgroup_size({{ wg }})
fn main(@builtin(workgroup_id) wid: vec3<u32>, @builtin(local_invocation_index) lid: u32) {
  if (wid.x >= group[{{ st.N_ROWS }}]) {
    return;
  }
  let row = group[{{ st.seqs }}u + wid.x * {{ st.SEQ_WORDS }}u + {{ st.LOGITS_ROW }}u];
  let base = wid.x * {{ n_vocab }}u;
  var top = -3.4e38;
  for (var i = lid; i < {{ n_valid }}u; i += {{ wg }}u) {
    top = max(top, logits[base + i]);
  }
  top = largest(top, lid);
  var share = 0.0;
  for (var i = lid; i < {{ n_valid }}u; i += {{ wg }}u) {
    share += exp(logits[base + i] - top);
  }
  share = sum(share, lid);
  if (lid == 0u) {
    scores[row] = logits[base + step[{{ st.targets }}u + row]] - top - log(share);
  }
}
