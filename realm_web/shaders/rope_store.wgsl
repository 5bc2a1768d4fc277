// Rotate q and k by their positions (RoPE), keep q, and store k and v in the pages of the KV cache, as f16 pairs or f32 (`kv`).
// step;  qkv (n_rows, (n_heads + 2 * n_kv) * head_dim) f32;  turns (rot_dim / 2,) u32: turns per position as a fraction
// of 2^32;  q (n_rows, n_heads * head_dim) f32;  k, v (n_blocks, n_kv, block_size, head_dim)
// The phase is an integer product that wraps at whole turns, so no precision is lost at far positions.
// With `ring` the pages are (max_seqs, ring, n_kv, block_size, head_dim / 2): each slot has `ring` blocks of its own and
// writes them round and round, for layers with a sliding window. rot_dim 0: no rotation.
// constants: n_heads, n_kv, head_dim, rot_dim, neox, magnitude (YaRN's factor on cos and sin), kv, block_size, ring, st
// grid: (ceil((n_heads + 2 * n_kv) * head_dim / 2 / 64), n_rows, 1)
{{ bind("step", "u32") }}
{{ bind("qkv", "f32") }}
{{ bind("turns", "u32") }}
{{ bind("q", "vec2<f32>", "read_write") }}
{{ bind("k", "u32", "read_write") }}
{{ bind("v", "u32", "read_write") }}
# set pairs = head_dim // 2
# set half_rot = rot_dim // 2

// Element d of the rotated head that starts at `base`.
fn rotated(base: u32, d: u32, position: u32) -> f32 {
  let value = qkv[base + d];
  # if rot_dim == 0
  return value;
  # else
  # if rot_dim < head_dim
  if (d >= {{ rot_dim }}u) {
    return value;
  }
  # endif
  # if neox
  let second = d >= {{ half_rot }}u;
  let i = select(d, d - {{ half_rot }}u, second);
  let other = qkv[base + select(d + {{ half_rot }}u, i, second)];
  # else
  let second = (d & 1u) == 1u;
  let i = d >> 1u;
  let other = qkv[base + (d ^ 1u)];
  # endif
  let angle = f32(bitcast<i32>(position * turns[i])) * 1.4629180792671596e-9;  // 2 pi / 2^32
  let rotated_other = select(-other, other, second);
  return (value * cos(angle) + rotated_other * sin(angle)) * {{ "%.9g" % magnitude }};
  # endif
}

@compute @workgroup_size(64)
fn main(@builtin(global_invocation_id) id: vec3<u32>) {
  let row = id.y;
  if (row >= step[{{ st.N_ROWS }}] || id.x >= {{ (n_heads + 2 * n_kv) * pairs }}u) {
    return;
  }
  let head = id.x / {{ pairs }}u;
  let pair = id.x % {{ pairs }}u;
  let position = step[{{ st.positions }}u + row];
  let base = row * {{ (n_heads + 2 * n_kv) * head_dim }}u + head * {{ head_dim }}u;
  var value: vec2<f32>;
  if (head < {{ n_heads + n_kv }}u) {
    value = vec2<f32>(rotated(base, 2u * pair, position), rotated(base, 2u * pair + 1u, position));
  } else {
    value = vec2<f32>(qkv[base + 2u * pair], qkv[base + 2u * pair + 1u]);
  }
  if (head < {{ n_heads }}u) {
    q[row * {{ n_heads * pairs }}u + id.x] = value;
    return;
  }
  let seq = step[{{ st.row_seqs }}u + row];
  # if ring
  let slot = step[{{ st.seqs }}u + seq * {{ st.SEQ_WORDS }}u + {{ st.SLOT }}u];
  let block = slot * {{ ring }}u + position / {{ block_size }}u % {{ ring }}u;
  # else
  let block = step[{{ st.tables }}u + seq * {{ st.max_blocks }}u + position / {{ block_size }}u];
  # endif
  let kv_head = (head - {{ n_heads }}u) % {{ n_kv }}u;
  let at = ((block * {{ n_kv }}u + kv_head) * {{ block_size }}u + position % {{ block_size }}u) * {{ pairs }}u + pair;
  # for name, test in (("k", "head < %du" % (n_heads + n_kv)), ("v", "head >= %du" % (n_heads + n_kv)))
  if ({{ test }}) {
    # if kv == "f16"
    {{ name }}[at] = pack2x16float(value);
    # else
    {{ name }}[2u * at] = bitcast<u32>(value.x);
    {{ name }}[2u * at + 1u] = bitcast<u32>(value.y);
    # endif
  }
  # endfor
}
