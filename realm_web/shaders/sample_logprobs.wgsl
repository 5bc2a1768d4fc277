// The log-probability of the token just drawn, and the 20 likeliest tokens with theirs: log_softmax of the logits as the
// model gave them, before bias, penalties, mask and temperature (as vLLM and OpenAI do). For sequences that ask.
// step;  logits (n_seqs, n_vocab) f32;  tops (n_seqs, parts, 42) u32 of `sample_top`;  slots (max_seqs,) u32
// logprobs (n_seqs, 41) u32: log-probability of the token, 20 ids, 20 log-probabilities, best first
// constants: n_vocab, parts, wg, st;  grid: (n_seqs, 1, 1)
# import "lib/sampling.wgsl" as sampling
# set each = (parts + wg - 1) // wg
{{ bind("step", "u32") }}
{{ bind("logits", "f32") }}
{{ bind("tops", "u32") }}
{{ bind("slots", "u32") }}
{{ bind("logprobs", "u32", "read_write") }}
{{ sampling.likeliest(wg, 400 * each) }}

var<workgroup> wholes: array<vec2<f32>, {{ wg }}>;  // largest logit, sum of exp(logit - largest)

fn joined(a: vec2<f32>, b: vec2<f32>) -> vec2<f32> {
  let top = max(a.x, b.x);
  return vec2<f32>(top, a.y * exp(a.x - top) + b.y * exp(b.x - top));
}

fn pair(at: u32) -> vec2<u32> {
  return vec2<u32>(tops[at], tops[at + 1u]);
}

@compute @workgroup_size({{ wg }})
fn main(@builtin(workgroup_id) wid: vec3<u32>, @builtin(local_invocation_index) lid: u32) {
  let s = wid.x;
  let seq = {{ st.seqs }}u + s * {{ st.SEQ_WORDS }}u;
  if (s >= step[{{ st.N_SEQS }}] || step[seq + {{ st.LOGITS_ROW }}u] == 0xffffffffu || step[seq + {{ st.TOP_LOGPROBS }}u] == 0u) {
    return;
  }
  var mine = vec2<f32>({{ sampling.lowest }}, 0.0);
  var first = nothing();
  for (var p = lid; p < {{ parts }}u; p += {{ wg }}u) {
    let base = (s * {{ parts }}u + p) * 42u;
    mine = joined(mine, vec2<f32>(bitcast<f32>(tops[base]), bitcast<f32>(tops[base + 1u])));
    if (better(pair(base + 2u), first)) {
      first = pair(base + 2u);
    }
  }
  wholes[lid] = mine;
  for (var stride = {{ wg // 2 }}u; stride > 0u; stride >>= 1u) {
    workgroupBarrier();
    if (lid < stride) {
      wholes[lid] = joined(wholes[lid], wholes[lid + stride]);
    }
  }
  find_bound(first, lid);
  for (var p = lid; p < {{ parts }}u; p += {{ wg }}u) {
    let base = (s * {{ parts }}u + p) * 42u + 2u;
    for (var i = 0u; i < 20u; i++) {
      offer(pair(base + 2u * i));
    }
  }
  workgroupBarrier();
  let normaliser = wholes[0].x + log(wholes[0].y);
  let n = min(atomicLoad(&n_offers), {{ 400 * each }}u);
  let base = s * 41u;
  for (var i = lid; i < n; i += {{ wg }}u) {
    let rank = rank_of(offers[i], n);
    if (rank < 20u) {
      logprobs[base + 1u + rank] = offers[i].y;
      logprobs[base + 21u + rank] = bitcast<u32>(bitcast<f32>(offers[i].x) - normaliser);
    }
  }
  for (var i = n + lid; i < 20u; i += {{ wg }}u) {
    logprobs[base + 1u + i] = 0xffffffffu;
    logprobs[base + 21u + i] = nothing().x;
  }
  if (lid == 0u) {
    let token = slots[step[seq + {{ st.SLOT }}u]];
    var chosen = {{ sampling.lowest }};
    if (token < {{ n_vocab }}u) {
      chosen = logits[s * {{ n_vocab }}u + token] - normaliser;
    }
    logprobs[base] = bitcast<u32>(chosen);
  }
}
