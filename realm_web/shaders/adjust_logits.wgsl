// Logit bias and penalties, in place. counts[slot, id]: how often the answer holds the token; bit 31: the prompt holds it.
// Repetition (Keskar et al., CTRL) over prompt and answer, frequency and presence (OpenAI) over the answer.
// step;  bias (max_seqs, n_vocab) f32;  counts (max_seqs, n_vocab) u32;  logits (n_seqs, n_vocab) f32
// constants: n_vocab, st;  grid: (ceil(n_vocab / 64), n_seqs, 1)
{{ bind("step", "u32") }}
{{ bind("bias", "f32") }}
{{ bind("counts", "u32") }}
{{ bind("logits", "f32", "read_write") }}

@compute @workgroup_size(64)
fn main(@builtin(global_invocation_id) id: vec3<u32>) {
  if (id.x >= {{ n_vocab }}u || id.y >= step[{{ st.N_SEQS }}]) {
    return;
  }
  let seq = {{ st.seqs }}u + id.y * {{ st.SEQ_WORDS }}u;
  let at = step[seq + {{ st.SLOT }}u] * {{ n_vocab }}u + id.x;
  let count = counts[at];
  var v = logits[id.y * {{ n_vocab }}u + id.x] + bias[at];
  if (count != 0u) {
    let repetition = bitcast<f32>(step[seq + {{ st.REPETITION }}u]);
    v = select(v * repetition, v / repetition, v > 0.0);
    let drawn = count & 0x7fffffffu;
    v -= bitcast<f32>(step[seq + {{ st.FREQUENCY }}u]) * f32(drawn);
    v -= select(0.0, bitcast<f32>(step[seq + {{ st.PRESENCE }}u]), drawn > 0u);
  }
  logits[id.y * {{ n_vocab }}u + id.x] = v;
}
