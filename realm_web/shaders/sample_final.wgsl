// The token of each sequence: the drawn one, or the best of the parts at temperature 0. Remembers it for its slot, counts
// it for the penalties, and with step[ADVANCE] moves the step buffer on by one token, so that the same program can run
// again without the host.
// step (read and written);  best (n_seqs, parts, 2) u32;  drawn (n_seqs,) u32;  slots (max_seqs,) u32;  out (n_seqs,) u32;
// [counts (max_seqs, n_vocab) u32]
// constants: n_vocab, parts, counting, st;  grid: (1, 1, 1), one thread per sequence
{{ bind("step", "u32", "read_write") }}
{{ bind("best", "vec2<u32>") }}
{{ bind("drawn", "u32") }}
{{ bind("slots", "u32", "read_write") }}
{{ bind("out", "u32", "read_write") }}
# if counting
{{ bind("counts", "u32", "read_write") }}
# endif

@compute @workgroup_size(64)
fn main(@builtin(local_invocation_index) lid: u32) {
  for (var s = lid; s < step[{{ st.N_SEQS }}]; s += 64u) {
    let seq = {{ st.seqs }}u + s * {{ st.SEQ_WORDS }}u;
    let row = step[seq + {{ st.LOGITS_ROW }}u];
    if (row == 0xffffffffu) {
      continue;
    }
    var token = drawn[s];
    if (bitcast<f32>(step[seq + {{ st.TEMPERATURE }}u]) <= 0.0) {
      var top = best[s * {{ parts }}u];
      for (var i = 1u; i < {{ parts }}u; i++) {
        let other = best[s * {{ parts }}u + i];
        if (bitcast<f32>(other.x) > bitcast<f32>(top.x)) {
          top = other;
        }
      }
      token = top.y;
    }
    let slot = step[seq + {{ st.SLOT }}u];
    slots[slot] = token;
    out[s] = token;
    # if counting
    counts[slot * {{ n_vocab }}u + token] += 1u;
    # endif
    if (step[{{ st.ADVANCE }}] != 0u) {
      step[{{ st.tokens }}u + row] = token;
      step[{{ st.positions }}u + row] += 1u;
      step[seq + {{ st.KV_LEN }}u] += 1u;
      step[seq + {{ st.DRAW_POSITION }}u] += 1u;
    }
  }
}
