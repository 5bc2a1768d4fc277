// Third pass of a draw: the mass of the tokens of each part that stay for sure, and a list of the tokens in the bins
// that top-k and top-p cut through, on which `sample_final` decides one by one.
// step;  logits (n_seqs, n_vocab) f32, adjusted;  parts (n_seqs, parts, 4) u32;  bins (n_seqs, 512, 2) u32
// list (n_seqs, 1 + parts + listed) u32: how many there are (more than `listed`: it is not complete), mass of each part,
// token ids in any order
// constants: n_vocab, n_valid, slice, parts, groups, listed, wg, st;  grid: (groups, n_seqs, 1)
# import "lib/sampling.wgsl" as sampling
{{ bind("step", "u32") }}
{{ bind("logits", "f32") }}
{{ bind("parts", "vec4<u32>") }}
{{ bind("bins", "vec2<u32>") }}
{{ bind("list", "atomic<u32>", "read_write") }}
{{ sampling.whole(parts, wg, true) }}
{{ sampling.rule() }}
{{ sampling.scan(wg) }}
{{ sampling.edges(wg) }}

# set each = (parts + groups - 1) // groups
var<workgroup> sure: array<atomic<u32>, {{ each }}>;

@compute @workgroup_size({{ wg }})
fn main(@builtin(workgroup_id) wid: vec3<u32>, @builtin(local_invocation_index) lid: u32) {
  let s = wid.y;
  let seq = {{ st.seqs }}u + s * {{ st.SEQ_WORDS }}u;
  let temperature = bitcast<f32>(step[seq + {{ st.TEMPERATURE }}u]);
  if (s >= step[{{ st.N_SEQS }}] || step[seq + {{ st.LOGITS_ROW }}u] == 0xffffffffu || temperature <= 0.0) {
    return;
  }
  let inverse = 1.0 / temperature;
  let rule = rule_of(whole(s, inverse, lid), inverse, bitcast<f32>(step[seq + {{ st.MIN_P }}u]));
  let top_k = step[seq + {{ st.TOP_K }}u];
  let top_p = bitcast<f32>(step[seq + {{ st.TOP_P }}u]);
  var cut = vec3<u32>({{ sampling.bins }}u);
  if (top_k > 0u || top_p < 1.0) {
    load_bins(s, lid);
    cut = edges(top_k, top_p, lid);
  }
  for (var p = lid; p < {{ each }}u; p += {{ wg }}u) {
    atomicStore(&sure[p], 0u);
  }
  workgroupBarrier();
  let base = s * {{ 1 + parts + listed }}u;
  for (var p = 0u; p < {{ each }}u; p++) {
    let start = (wid.x * {{ each }}u + p) * {{ slice }}u;
    let end = min(start + {{ slice }}u, {{ n_valid }}u);
    var stays = 0u;
    for (var i = start + lid; i < end; i += {{ wg }}u) {
      let v = logits[s * {{ n_vocab }}u + i];
      let mass = mass_of(rule, v);
      if (mass > 0u) {
        let b = bin_of(rule, v);
        if (b < min(cut.x, cut.y)) {
          stays += mass;
        } else if (b == cut.x || (b >= cut.y && b <= cut.z)) {
          let place = atomicAdd(&list[base], 1u);
          if (place < {{ listed }}u) {
            atomicStore(&list[base + {{ 1 + parts }}u + place], i);
          }
        }
      }
    }
    atomicAdd(&sure[p], stays);
  }
  workgroupBarrier();
  for (var p = lid; p < {{ each }}u; p += {{ wg }}u) {
    if (wid.x * {{ each }}u + p < {{ parts }}u) {
      atomicStore(&list[base + 1u + wid.x * {{ each }}u + p], atomicLoad(&sure[p]));
    }
  }
}
