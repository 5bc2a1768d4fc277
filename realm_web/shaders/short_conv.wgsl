// Gated short convolution (LFM2): out[r] = c[r] * sum over j of weight[:, l_cache - 1 - j] * (b * x)[r - j], by channel and
// over the rows of one sequence. Before its first row in this step come the values that the state of its slot holds, or
// zeros at position 0; the state becomes the last l_cache - 1 values. So a slot that is used again needs no clearing.
// step;  bcx (n_rows, 3 * dim) f32: b, c and x side by side;  weight (dim, l_cache) f32;
// state f32: slot s has (l_cache - 1, dim) from s * stride on, oldest first;  out (n_rows, dim) f32
// Nothing races: the thread of a sequence's first row computes all rows that need the old state and is the only one that
// reads and writes it; other threads compute their row from bcx alone.
// constants: dim, l_cache, stride (elements), st;  grid: (ceil(dim / 4 / 64), n_rows, 1), 4 channels a thread
{{ bind("step", "u32") }}
{{ bind("bcx", "vec4<f32>") }}
{{ bind("weight", "f32") }}
{{ bind("state", "vec4<f32>", "read_write") }}
{{ bind("out", "vec4<f32>", "read_write") }}
# set past = l_cache - 1
# set quads = dim // 4

fn tap(i: u32, j: u32) -> vec4<f32> {
  let at = i * {{ 4 * l_cache }}u + j;
  return vec4<f32>(
    weight[at], weight[at + {{ l_cache }}u], weight[at + {{ 2 * l_cache }}u], weight[at + {{ 3 * l_cache }}u],
  );
}

fn value(row: u32, i: u32) -> vec4<f32> {
  let at = row * {{ 3 * quads }}u + i;
  return bcx[at] * bcx[at + {{ 2 * quads }}u];
}

fn gate(row: u32, i: u32) -> vec4<f32> {
  return bcx[row * {{ 3 * quads }}u + {{ quads }}u + i];
}

@compute @workgroup_size(64)
fn main(@builtin(global_invocation_id) id: vec3<u32>) {
  let row = id.y;
  let i = id.x;
  if (row >= step[{{ st.N_ROWS }}] || i >= {{ quads }}u) {
    return;
  }
  let seq = step[{{ st.row_seqs }}u + row];
  if (row >= {{ past }}u && step[{{ st.row_seqs }}u + row - {{ past }}u] == seq) {
    var sum = value(row, i) * tap(i, {{ past }}u);
    # for j in range(past)
    sum += value(row - {{ past - j }}u, i) * tap(i, {{ j }}u);
    # endfor
    out[row * {{ quads }}u + i] = gate(row, i) * sum;
    return;
  }
  if (row > 0u && step[{{ st.row_seqs }}u + row - 1u] == seq) {
    return;
  }
  let record = {{ st.seqs }}u + seq * {{ st.SEQ_WORDS }}u;
  let position = step[{{ st.positions }}u + row];
  let n = step[record + {{ st.KV_LEN }}u] - position;
  let base = step[record + {{ st.SLOT }}u] * {{ stride // 4 }}u + i;
  // the last values before the row at hand, oldest first
  # for j in range(past)
  var past{{ j }} = select(state[base + {{ j * quads }}u], vec4<f32>(), position == 0u);
  # endfor
  # for k in range(past)
  if ({{ k }}u < n) {
    let newest = value(row + {{ k }}u, i);
    var sum = newest * tap(i, {{ past }}u);
    # for j in range(past)
    sum += past{{ j }} * tap(i, {{ j }}u);
    # endfor
    out[(row + {{ k }}u) * {{ quads }}u + i] = gate(row + {{ k }}u, i) * sum;
    # for j in range(past - 1)
    past{{ j }} = past{{ j + 1 }};
    # endfor
    past{{ past - 1 }} = newest;
  }
  # endfor
  if (n > {{ past }}u) {
    # for j in range(past)
    past{{ j }} = value(row + n - {{ past - j }}u, i);
    # endfor
  }
  # for j in range(past)
  state[base + {{ j * quads }}u] = past{{ j }};
  # endfor
}
