// scores[row] = log_softmax(logits)[target of the row], for the rows of one group
// step;  group u32: its step buffer (see row_scores_select.wgsl);  logits (group_rows, n_vocab) f32, of which the first
// n_valid are of tokens;  scores (max_rows,) f32
// One pass: a thread keeps the largest logit so far and the sum of exponentials relative to it (Milakov and Gimelshein,
// "Online normalizer calculation for softmax"). Four loads are under way at a time, of four logits each where rows allow it.
// constants: n_vocab, n_valid, wg, subgroup, st;  grid: (group_rows, 1, 1)
# import "lib/reduce.wgsl" as lib
# set vec = 1 if n_vocab % 4 else 4
# set t = "f32" if vec == 1 else "vec4<f32>"
# set n_whole = n_valid // vec
{{ "enable subgroups;" if subgroup }}
{{ bind("step", "u32") }}
{{ bind("group", "u32") }}
{{ bind("logits", t) }}
{{ bind("scores", "f32", "read_write") }}

{{ lib.workgroup_reduce("largest", "max", wg, subgroup) }}
{{ lib.workgroup_reduce("sum", "add", wg, subgroup) }}

const LOWEST = -3.4e38;

# if vec == 4
fn top_of(v: vec4<f32>) -> f32 {
  return max(max(v.x, v.y), max(v.z, v.w));
}

fn total_of(v: vec4<f32>) -> f32 {
  return v.x + v.y + v.z + v.w;
}

# endif
@compute @workgroup_size({{ wg }})
fn main(@builtin(workgroup_id) wid: vec3<u32>, @builtin(local_invocation_index) lid: u32) {
  if (wid.x >= group[{{ st.N_ROWS }}]) {
    return;
  }
  let base = wid.x * {{ n_vocab // vec }}u;
  var top = LOWEST;
  var share = 0.0;
  # if n_whole
  for (var i = lid; i < {{ n_whole }}u; i += {{ 4 * wg }}u) {
    # for j in range(4)
    let at{{ j }} = i + {{ j * wg }}u;
    let loaded{{ j }} = logits[base + min(at{{ j }}, {{ n_whole - 1 }}u)];
    # endfor
    # for j in range(4)
    let v{{ j }} = select({{ t }}(LOWEST), loaded{{ j }}, at{{ j }} < {{ n_whole }}u);
    # endfor
    let here = max(max(v0, v1), max(v2, v3));
    let higher = max(top, {{ "top_of(here)" if vec == 4 else "here" }});
    let parts = exp(v0 - higher) + exp(v1 - higher) + exp(v2 - higher) + exp(v3 - higher);
    share = share * exp(top - higher) + {{ "total_of(parts)" if vec == 4 else "parts" }};
    top = higher;
  }
  # endif
  # for i in range(n_whole * vec, n_valid)
  if (lid == {{ i % vec }}u) {
    let v = logits[base + {{ i // vec }}u][{{ i % vec }}];
    let higher = max(top, v);
    share = share * exp(top - higher) + exp(v - higher);
    top = higher;
  }
  # endfor
  let best = largest(top, lid);
  share = sum(share * exp(top - best), lid);
  if (lid == 0u) {
    let row = group[{{ st.seqs }}u + wid.x * {{ st.SEQ_WORDS }}u + {{ st.LOGITS_ROW }}u];
    let token = step[{{ st.targets }}u + row];
    let logit = logits[base + token / {{ vec }}u]{{ "[token % 4u]" if vec == 4 }};
    scores[row] = logit - best - log(share);
  }
}
