// Of each part of the vocabulary the 20 largest logits, as the model gave them, and the sum of the exponentials. Only
// for sequences that ask for log-probabilities.
// step;  logits (n_seqs, n_vocab) f32;  tops (n_seqs, parts, 42) u32: largest logit, sum of exp(logit - largest), then
// 20 pairs of logit and token id, best first; where there are fewer, the id is 0xffffffff
// constants: n_vocab, n_valid, slice, parts, wg, st;  grid: (parts, n_seqs, 1)
# import "lib/sampling.wgsl" as sampling
# set each = (slice + wg - 1) // wg
{{ bind("step", "u32") }}
{{ bind("logits", "f32") }}
{{ bind("tops", "u32", "read_write") }}
{{ sampling.likeliest(wg, 20 * each) }}

var<workgroup> exps: array<f32, {{ wg }}>;

@compute @workgroup_size({{ wg }})
fn main(@builtin(workgroup_id) wid: vec3<u32>, @builtin(local_invocation_index) lid: u32) {
  let s = wid.y;
  let seq = {{ st.seqs }}u + s * {{ st.SEQ_WORDS }}u;
  if (s >= step[{{ st.N_SEQS }}] || step[seq + {{ st.LOGITS_ROW }}u] == 0xffffffffu || step[seq + {{ st.TOP_LOGPROBS }}u] == 0u) {
    return;
  }
  let start = wid.x * {{ slice }}u;
  let end = min(start + {{ slice }}u, {{ n_valid }}u);
  var mine: array<vec2<u32>, {{ each }}>;
  var first = nothing();
  for (var j = 0u; j < {{ each }}u; j++) {
    let i = start + j * {{ wg }}u + lid;
    mine[j] = nothing();
    if (i < end) {
      let v = logits[s * {{ n_vocab }}u + i];
      if (v > {{ sampling.lowest }}) {
        mine[j] = vec2<u32>(bitcast<u32>(v), i);
      }
      if (better(mine[j], first)) {
        first = mine[j];
      }
    }
  }
  find_bound(first, lid);
  for (var j = 0u; j < {{ each }}u; j++) {
    offer(mine[j]);
  }
  workgroupBarrier();
  let n = min(atomicLoad(&n_offers), {{ 20 * each }}u);
  let base = (s * {{ parts }}u + wid.x) * 42u;
  for (var i = lid; i < n; i += {{ wg }}u) {
    let rank = rank_of(offers[i], n);
    if (rank == 0u) {
      bound = offers[i];
    }
    if (rank < 20u) {
      tops[base + 2u + 2u * rank] = offers[i].x;
      tops[base + 3u + 2u * rank] = offers[i].y;
    }
  }
  if (lid == 0u && n == 0u) {
    bound = nothing();
  }
  for (var i = n + lid; i < 20u; i += {{ wg }}u) {
    tops[base + 2u + 2u * i] = nothing().x;
    tops[base + 3u + 2u * i] = nothing().y;
  }
  workgroupBarrier();
  let largest = bitcast<f32>(bound.x);
  var sum = 0.0;
  for (var j = 0u; j < {{ each }}u; j++) {
    sum += select(0.0, exp(bitcast<f32>(mine[j].x) - largest), mine[j].y != 0xffffffffu);
  }
  exps[lid] = sum;
  for (var stride = {{ wg // 2 }}u; stride > 0u; stride >>= 1u) {
    workgroupBarrier();
    if (lid < stride) {
      exps[lid] += exps[lid + stride];
    }
  }
  if (lid == 0u) {
    tops[base] = bound.x;
    tops[base + 1u] = bitcast<u32>(exps[0]);
  }
}
