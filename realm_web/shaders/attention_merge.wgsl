// The parts of `attention` and `attention_tiles` with splits > 1 made whole: each split weighted by exp(its maximum - the largest).
// step;  parts (n_rows, n_heads, splits, head_dim + 4) f32, of which the first splits are written; of "single" rows by sequence
// [sinks (n_heads,) f32];  out (n_rows, n_heads * head_dim) f32.  With `to_bytes` out is rows of
// lib/ints.wgsl: takes subgroups of 8 or more and heads of whole chunks.
// The constants are as there, `rows` can be "tiles", too.  qt: 1 but for "tiles".  wg: at least head_dim / 4 and splits.
// constants: n_heads, head_dim, block_size, window, rows, qt, skip, splits, share, sinks, sure, to_bytes, wg, st
// grid: (n_heads, rows or tiles * qt, 1)
# import "lib/quantise.wgsl" as quantise
# set quads = head_dim // 4
# set ns = namespace(ways=1)
# for _ in range(6) if ns.ways * 2 * quads <= wg and ns.ways < splits
# set ns.ways = ns.ways * 2
# endfor
# set ways = ns.ways
# set each = (splits + ways - 1) // ways
{{ "enable subgroups;" if to_bytes }}
{{ bind("step", "u32") }}
{{ bind("parts", "vec4<f32>") }}
# if sinks
{{ bind("sinks", "f32") }}
# endif
{{ bind("out", "u32" if to_bytes else "vec4<f32>", "read_write") }}
{{ quantise.functions() if to_bytes }}

var<workgroup> sums: array<vec4<f32>, {{ ways * quads }}>;
var<workgroup> weights: array<f32, {{ ways }}>;
var<workgroup> stats: array<vec2<f32>, {{ splits }}>;

@compute @workgroup_size({{ wg }})
fn main(@builtin(workgroup_id) wid: vec3<u32>, @builtin(local_invocation_index) lid: u32) {
  # if rows != "all"
  let nth = wid.y / {{ qt }}u;
  if (nth >= step[{{ st.N_TILES }}]) {
    return;
  }
  let tile = step[{{ st.tiles }}u + nth];
  let row0 = tile & 0xffffu;
  let count = tile >> 16u;
  let row = row0 + wid.y % {{ qt }}u;
  if (row - row0 >= count{{ " || count > 1u" if rows == "single" else " || count == 1u" if skip }}) {
    return;
  }
  # else
  let row = wid.y;
  let row0 = row;
  let count = 1u;
  # endif
  # if rows == "single"
  let base = (step[{{ st.row_seqs }}u + row] * {{ n_heads }}u + wid.x) * {{ splits * (quads + 1) }}u;
  # else
  let base = (row * {{ n_heads }}u + wid.x) * {{ splits * (quads + 1) }}u;
  # endif
  let quad = lid % {{ quads }}u;
  let way = lid / {{ quads }}u;
  // loads of all splits, before it is known how many there are
  # for i in range(each)
  let part{{ i }} = parts[base + min(way + {{ i * ways }}u, {{ splits - 1 }}u) * {{ quads + 1 }}u + quad];
  # endfor
  let of_split = parts[base + min(lid, {{ splits - 1 }}u) * {{ quads + 1 }}u + {{ quads }}u].xy;
  # if rows == "all" and not sure
  if (row >= step[{{ st.N_ROWS }}]) {
    return;
  }
  # endif
  let position0 = step[{{ st.positions }}u + row0];
  let end = position0 + count;
  # if window
  let start = (max(position0 + 1u, {{ window }}u) - {{ window }}u) / {{ block_size }}u * {{ block_size }}u;
  # else
  let start = 0u;
  # endif
  let share = max({{ share }}u, (end - start + {{ splits * block_size - 1 }}u) / {{ splits * block_size }}u * {{ block_size }}u);
  let last = (end - start - 1u) / share;
  let head = row * {{ n_heads }}u + wid.x;
  if (lid < {{ splits }}u) {
    stats[lid] = select(vec2<f32>(-1e30, 0.0), of_split, lid <= last);
  }
  workgroupBarrier();
  var top = {{ "sinks[wid.x]" if sinks else "-1e30" }};
  # for i in range(splits)
  top = max(top, stats[{{ i }}].x);
  # endfor
  if (way < {{ ways }}u) {
    var total = vec4<f32>();
    var weight = 0.0;
    # for i in range(each)
    if (way + {{ i * ways }}u <= last) {
      let of_split = stats[way + {{ i * ways }}u];
      let w = exp(of_split.x - top);
      total += w * part{{ i }};
      weight += w * of_split.y;
    }
    # endfor
    sums[lid] = total;
    if (quad == 0u) {
      weights[way] = weight;
    }
  }
  workgroupBarrier();
  {
    var total = sums[quad];
    var weight = weights[0];
    # for i in range(1, ways)
    total += sums[{{ i * quads }}u + quad];
    weight += weights[{{ i }}];
    # endfor
    # if sinks
    weight += exp(sinks[wid.x] - top);
    # endif
    let v = total / weight;
    # if to_bytes
{{ quantise.chunk_of_lanes() }}
    if (lid < {{ quads }}u) {
      let to = row * {{ 3 * n_heads * head_dim // 8 }}u;
      let at = wid.x * {{ quads }}u + lid;
{{ quantise.put_lane({"name": "out", "to": "to", "k": n_heads * head_dim}, "at", "") }}
    }
    # else
    if (lid < {{ quads }}u) {
      out[head * {{ quads }}u + lid] = v;
    }
    # endif
  }
}
