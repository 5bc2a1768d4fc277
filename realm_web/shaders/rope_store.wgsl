// Rotate q and k by their positions (`lib/rope.wgsl`), keep q, and store k and v in the pages of the KV cache
// (`lib/pages.wgsl`). With `norm` each head of q and k is RMS-normed first (Qwen 3, Gemma 3).
// step;  qkv (n_rows, (n_heads + 2 * n_kv) * head_dim) f32;  turns (rot_dim / 2,) u32
// [norm: q_weight, k_weight (head_dim,) f32];  q (n_rows, n_heads * head_dim) f32
// k, v (n_blocks, n_kv) pages; with `ring` (max_seqs, ring, n_kv): each slot has `ring` blocks of its own and writes them
// round and round, for layers with a sliding window. rot_dim 0: no rotation.
// constants: n_heads, n_kv, head_dim, rot_dim, neox, magnitude, norm, eps, kv, block_size, ring, subgroup, st
// grid: (n_heads + 2 * n_kv, n_rows, 1)
# import "lib/pages.wgsl" as pages
# import "lib/reduce.wgsl" as lib
# import "lib/rope.wgsl" as rope
# set wg = 64
{{ "enable subgroups;" if subgroup and norm }}
{{ bind("step", "u32") }}
{{ bind("qkv", "f32") }}
{{ bind("turns", "u32") }}
# if norm
{{ bind("q_weight", "f32") }}
{{ bind("k_weight", "f32") }}
# endif
{{ bind("q", "f32", "read_write") }}
{{ bind("k", pages.element(kv), "read_write") }}
{{ bind("v", pages.element(kv), "read_write") }}

var<workgroup> fresh: array<f32, {{ head_dim }}>;

{{ pages.types(kv) }}
{{ pages.makes(kv, head_dim) }}
{{ pages.writes("k", kv, head_dim, block_size) }}
{{ pages.writes("v", kv, head_dim, block_size) }}
{{ pages.page_of(kv, n_kv, head_dim, block_size, ring) }}
{{ rope.functions(head_dim, rot_dim, neox, magnitude) }}
# if norm
{{ lib.workgroup_reduce("sum", "add", wg, subgroup) }}
# endif

@compute @workgroup_size({{ wg }})
fn main(@builtin(workgroup_id) wid: vec3<u32>, @builtin(local_invocation_index) lid: u32) {
  let row = wid.y;
  if (row >= step[{{ st.N_ROWS }}]) {
    return;
  }
  let head = wid.x;
  let position = step[{{ st.positions }}u + row];
  let base = (row * {{ n_heads + 2 * n_kv }}u + head) * {{ head_dim }}u;
  # if norm
  var squares = 0.0;
  for (var d = lid; d < {{ head_dim }}u; d += {{ wg }}u) {
    squares += qkv[base + d] * qkv[base + d];
  }
  let factor = inverseSqrt(sum(squares, lid) / {{ head_dim }}.0 + {{ "%.9g" % eps }});
  # endif
  for (var d = lid; d < {{ head_dim }}u; d += {{ wg }}u) {
    var value = qkv[base + d];
    if (head < {{ n_heads + n_kv }}u) {
      let p = partner(d);
      # if norm
      let first = value * factor * select(k_weight[d], q_weight[d], head < {{ n_heads }}u);
      let second = qkv[base + p] * factor * select(k_weight[p], q_weight[p], head < {{ n_heads }}u);
      value = turned(first, second, d, position);
      # else
      value = turned(value, qkv[base + p], d, position);
      # endif
    }
    if (head < {{ n_heads }}u) {
      q[(row * {{ n_heads }}u + head) * {{ head_dim }}u + d] = value;
    } else {
      fresh[d] = value;
    }
  }
  workgroupBarrier();
  if (head >= {{ n_heads }}u && lid < {{ head_dim // 8 }}u) {
    let seq = step[{{ st.row_seqs }}u + row];
    let page = page_of(position, {{ pages.table_of("seq", ring, st) }}, (head - {{ n_heads }}u) % {{ n_kv }}u);
    let scales = scales_of(0u, lid);
    let raw = made(fresh_unit(8u * lid), scales);
    if (head < {{ n_heads + n_kv }}u) {
      k_write(page, position % {{ block_size }}u, lid, raw, scales);
    } else {
      v_write(page, position % {{ block_size }}u, lid, raw, scales);
    }
  }
}
