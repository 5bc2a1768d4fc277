// Gathers the rows that have a target into groups, whose logits fit memory, and gives each group a step buffer of its own:
// N_ROWS and N_SEQS say how many rows it has, the LOGITS_ROW of record i is its row i. Other kernels run on a group as
// on any step. Scores of rows without a target become 0.
// step;  groups (n_groups, stride) u32, stride at least st.seqs + group_rows * SEQ_WORDS;  scores (max_rows,) f32
// Thread i has the rows from i * each on, so that the rows of the groups are in order.
// constants: group_rows, n_groups, stride, each (rows per thread), st;  grid: (1, 1, 1)
{{ bind("step", "u32") }}
{{ bind("groups", "u32", "read_write") }}
{{ bind("scores", "f32", "read_write") }}

var<workgroup> counts: array<u32, 64>;

@compute @workgroup_size(64)
fn main(@builtin(local_invocation_index) lid: u32) {
  let start = lid * {{ each }}u;
  let end = min(start + {{ each }}u, step[{{ st.N_ROWS }}]);
  var count = 0u;
  for (var row = start; row < end; row++) {
    count += select(1u, 0u, step[{{ st.targets }}u + row] == 0xffffffffu);
  }
  counts[lid] = count;
  workgroupBarrier();
  var place = 0u;
  var total = 0u;
  for (var i = 0u; i < 64u; i++) {
    place += select(0u, counts[i], i < lid);
    total += counts[i];
  }
  for (var row = start; row < end; row++) {
    if (step[{{ st.targets }}u + row] == 0xffffffffu) {
      scores[row] = 0.0;
    } else {
      let group = place / {{ group_rows }}u * {{ stride }}u;
      let record = {{ st.seqs }}u + place % {{ group_rows }}u * {{ st.SEQ_WORDS }}u;
      groups[group + record + {{ st.LOGITS_ROW }}u] = row;
      place++;
    }
  }
  for (var g = lid; g < {{ n_groups }}u; g += 64u) {
    let n = min(max(total, g * {{ group_rows }}u) - g * {{ group_rows }}u, {{ group_rows }}u);
    groups[g * {{ stride }}u + {{ st.N_ROWS }}u] = n;
    groups[g * {{ stride }}u + {{ st.N_SEQS }}u] = n;
  }
}
