// The mean, the last or the first (cls) of each sequence's rows, over all steps since its position 0: out[s].
// step;  x (n_rows, dim) f32;  kept (max_seqs, dim) f32: by slot, the sum or the first row so far;  out (n_seqs, dim) f32
// Rows of a sequence are next to each other and sequences in order, so that a search finds its first row. One thread adds
// them one after the other, so that it makes no difference in how many steps they come. Sequences that are not pooled
// leave `out` as it is.
// constants: dim, st;  grid: (ceil(dim / 4 / 64), n_seqs, 1), 4 channels a thread
# set quads = dim // 4
{{ bind("step", "u32") }}
{{ bind("x", "vec4<f32>") }}
{{ bind("kept", "vec4<f32>", "read_write") }}
{{ bind("out", "vec4<f32>", "read_write") }}

// The first row of sequence `seq` or a later one.
fn first_row(seq: u32) -> u32 {
  var low = 0u;
  var high = step[{{ st.N_ROWS }}];
  while (low < high) {
    let middle = (low + high) / 2u;
    if (step[{{ st.row_seqs }}u + middle] < seq) {
      low = middle + 1u;
    } else {
      high = middle;
    }
  }
  return low;
}

@compute @workgroup_size(64)
fn main(@builtin(global_invocation_id) id: vec3<u32>) {
  let seq = id.y;
  let i = id.x;
  if (seq >= step[{{ st.N_SEQS }}] || i >= {{ quads }}u) {
    return;
  }
  let record = {{ st.seqs }}u + seq * {{ st.SEQ_WORDS }}u;
  let pool = step[record + {{ st.POOL }}u];
  let start = first_row(seq);
  let end = first_row(seq + 1u);
  if (pool == {{ st.NO_POOL }}u || start == end) {
    return;
  }
  if (pool == {{ st.LAST }}u) {
    out[seq * {{ quads }}u + i] = x[(end - 1u) * {{ quads }}u + i];
    return;
  }
  let place = step[record + {{ st.SLOT }}u] * {{ quads }}u + i;
  let fresh = step[{{ st.positions }}u + start] == 0u;
  var value = kept[place];
  if (pool == {{ st.CLS }}u) {
    value = select(value, x[start * {{ quads }}u + i], fresh);
    kept[place] = value;
    out[seq * {{ quads }}u + i] = value;
    return;
  }
  value = select(value, vec4<f32>(), fresh);
  for (var row = start; row < end; row++) {
    value += x[row * {{ quads }}u + i];
  }
  kept[place] = value;
  out[seq * {{ quads }}u + i] = value / f32(step[record + {{ st.KV_LEN }}u]);
}
