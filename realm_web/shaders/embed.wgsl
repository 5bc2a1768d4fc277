// Rows of the embedding matrix for the tokens of this step; one dispatch per shard of the matrix.
// step;  slots (max_seqs,) u32: the token each slot drew last;  weight (rows of this shard, dim);  out (n_rows, dim) f32
// constants: fmt, dim, first_row, n_shard_rows, scale, st (StepLayout);  grid: (ceil(n_rows * dim / 32 / 64), 1, 1)
{{ bind("step", "u32") }}
{{ bind("slots", "u32") }}
{{ weight("w", fmt) }}
{{ bind("out", "vec4<f32>", "read_write") }}

@compute @workgroup_size(64)
fn main(@builtin(global_invocation_id) id: vec3<u32>) {
  let row = id.x / {{ dim // 32 }}u;
  let chunk = id.x % {{ dim // 32 }}u;
  // no load waits for another that it does not need
  let is_there = row < step[{{ st.N_ROWS }}];
  let given = step[{{ st.tokens }}u + row];
  let seq = select(0u, step[{{ st.row_seqs }}u + row], is_there);
  let drawn = slots[step[{{ st.seqs }}u + seq * {{ st.SEQ_WORDS }}u + {{ st.SLOT }}u]];
  let token = select(given, drawn, given == 0xffffffffu);
  if (!is_there || token < {{ first_row }}u || token >= {{ first_row + n_shard_rows }}u) {
    return;
  }
  let v = w_decode((token - {{ first_row }}u) * {{ dim // 32 }}u + chunk);
  # for i in range(8)
  out[id.x * 8u + {{ i }}u] = v[{{ i }}] * {{ "%.9g" % scale }};
  # endfor
}
