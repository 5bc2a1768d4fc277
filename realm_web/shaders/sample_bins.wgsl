// Second pass of a draw: how many tokens with mass, and how much mass, lie how far below the largest logit. Only for
// sequences with top-k or top-p. Also empties the list that `sample_gather` appends to.
// step;  logits (n_seqs, n_vocab) f32, adjusted;  parts (n_seqs, parts, 4) u32;  bins (n_seqs, 512, 2) u32
// list (n_seqs, 1 + parts + listed) u32
// constants: n_vocab, n_valid, slice, parts, groups, listed, wg, st;  grid: (groups, n_seqs, 1)
# import "lib/sampling.wgsl" as sampling
{{ bind("step", "u32") }}
{{ bind("logits", "f32") }}
{{ bind("parts", "vec4<u32>") }}
{{ bind("bins", "atomic<u32>", "read_write") }}
{{ bind("list", "u32", "read_write") }}
{{ sampling.whole(parts, wg, true) }}
{{ sampling.rule() }}

var<workgroup> tally: array<atomic<u32>, {{ 2 * sampling.bins }}>;

@compute @workgroup_size({{ wg }})
fn main(@builtin(workgroup_id) wid: vec3<u32>, @builtin(local_invocation_index) lid: u32) {
  let s = wid.y;
  let seq = {{ st.seqs }}u + s * {{ st.SEQ_WORDS }}u;
  let temperature = bitcast<f32>(step[seq + {{ st.TEMPERATURE }}u]);
  let by_count = step[seq + {{ st.TOP_K }}u] > 0u;
  let by_mass = bitcast<f32>(step[seq + {{ st.TOP_P }}u]) < 1.0;
  if (s >= step[{{ st.N_SEQS }}] || step[seq + {{ st.LOGITS_ROW }}u] == 0xffffffffu || temperature <= 0.0 || !(by_count || by_mass)) {
    return;
  }
  if (wid.x == 0u && lid == 0u) {
    list[s * {{ 1 + parts + listed }}u] = 0u;
  }
  for (var b = lid; b < {{ 2 * sampling.bins }}u; b += {{ wg }}u) {
    atomicStore(&tally[b], 0u);
  }
  let inverse = 1.0 / temperature;
  let rule = rule_of(whole(s, inverse, lid), inverse, bitcast<f32>(step[seq + {{ st.MIN_P }}u]));
  for (var i = wid.x * {{ wg }}u + lid; i < {{ n_valid }}u; i += {{ groups * wg }}u) {
    let v = logits[s * {{ n_vocab }}u + i];
    let mass = mass_of(rule, v);
    if (mass > 0u) {
      let b = 2u * bin_of(rule, v);
      if (by_count) {
        atomicAdd(&tally[b], 1u);
      }
      atomicAdd(&tally[b + 1u], mass);
    }
  }
  workgroupBarrier();
  for (var b = lid; b < {{ 2 * sampling.bins }}u; b += {{ wg }}u) {
    let here = atomicLoad(&tally[b]);
    if (here > 0u) {
      atomicAdd(&bins[s * {{ 2 * sampling.bins }}u + b], here);
    }
  }
}
