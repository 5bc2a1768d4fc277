// Causal attention of tiles of rows over the paged KV cache (Dao et al., FlashAttention), one workgroup per (tile, `nq`
// query heads of one kv head): `qt` rows times `nq` heads are the queries, taken by `tm` x `tn` threads in squares of
// `mr` queries x `nr` keys, then of `mr` queries x head_dim / `tn` values, through workgroup memory.
// step, with tiles of up to `qt` rows;  q (n_rows, n_heads * head_dim) f32;  k, v (n_blocks, n_kv) pages
// [sinks (n_heads,) f32];  out (n_rows, n_heads * head_dim) f32.  kv, ring, window, softcap, scale: as in `attention`.
// With splits > 1 the context of a tile is cut, and out is parts as in `attention`, for all rows.
// `skip`: tiles of one row are left to `attention`.  `keys`: how many keys' values are in workgroup memory at a time.
// constants: n_heads, n_kv, head_dim, kv, block_size, scale, softcap, window, ring, sinks, skip, qt, nq, tm, tn, mr, nr, keys,
// splits, share, subgroup, st
// grid: (tiles, n_heads / nq, splits)
# import "lib/pages.wgsl" as pages
# set group = n_heads // n_kv
# set wg = tm * tn
# set M = tm * mr
# set N = tn * nr
# set units = head_dim // 8
# set slices = (head_dim + 31) // 32
# set quads = head_dim // 4
# set dv = (quads + tn - 1) // tn
# set tail = quads % tn
# set shuffle = subgroup >= tn
{{ "enable subgroups;" if shuffle }}
{{ bind("step", "u32") }}
{{ bind("q", "vec4<f32>") }}
{{ bind("k", pages.element(kv)) }}
{{ bind("v", pages.element(kv)) }}
# if sinks
{{ bind("sinks", "f32") }}
# endif
{{ bind("out", "vec4<f32>", "read_write") }}

const NEVER = -1e30;

{{ pages.types(kv) }}
{{ pages.reads("k", kv, head_dim, block_size) }}
{{ pages.reads("v", kv, head_dim, block_size) }}
{{ pages.page_of(kv, n_kv, head_dim, block_size, ring) }}
var<workgroup> qs: array<vec4<f32>, {{ 8 * (M + 1) }}>;
# set tile = [8 * (N + 1), keys * quads] | max
var<workgroup> kvs: array<vec4<f32>, {{ tile }}>;
var<workgroup> ps: array<vec4<f32>, {{ M * (N // 4 + 1) }}>;
# if not shuffle
var<workgroup> red: array<f32, {{ M * tn }}>;
# endif

@compute @workgroup_size({{ wg }})
fn main(@builtin(workgroup_id) wid: vec3<u32>, @builtin(local_invocation_index) lid: u32) {
  let n_tiles = step[{{ st.N_TILES }}];
  if (wid.x >= n_tiles) {
    return;
  }
  let tile = step[{{ st.tiles }}u + n_tiles - 1u - wid.x];  // the longest contexts first
  let row0 = tile & 0xffffu;
  let count = tile >> 16u;
  # if skip
  if (count == 1u) {
    return;
  }
  # endif
  let table = {{ pages.table_of("step[%du + row0]" % st.row_seqs, ring, st) }};
  let position0 = step[{{ st.positions }}u + row0];
  let end = position0 + count;
  # if window
  let start = (max(position0 + 1u, {{ window }}u) - {{ window }}u) / {{ block_size }}u * {{ block_size }}u;
  # else
  let start = 0u;
  # endif
  # if splits > 1
  let share = max({{ share }}u, (end - start + {{ splits * block_size - 1 }}u) / {{ splits * block_size }}u * {{ block_size }}u);
  let low = start + wid.z * share;
  if (low >= end) {
    return;
  }
  let high = min(low + share, end);
  # else
  let low = start;
  let high = end;
  # endif
  let head0 = wid.y * {{ nq }}u;
  let kv_head = head0 / {{ group }}u;
  let tn = lid % {{ tn }}u;
  let tm = lid / {{ tn }}u;
  # for i in range(mr)
  let seen{{ i }} = position0 + min((tm + {{ i * tm }}u) / {{ nq }}u, count - 1u);
  var top{{ i }} = NEVER;
  var sum{{ i }} = 0.0;
  # for j in range(dv)
  var acc{{ i }}_{{ j }} = vec4<f32>();
  # endfor
  # endfor

  for (var here = low; here < high; here += {{ N }}u) {
    # for i in range(mr)
    # for j in range(nr // 4)
    var s{{ i }}_{{ j }} = vec4<f32>();
    # endfor
    # endfor
    for (var slice = 0u; slice < {{ slices }}u; slice++) {
      for (var i = lid; i < {{ 8 * M }}u; i += {{ wg }}u) {
        let m = min(i / 8u, count * {{ nq }}u - 1u);
        let quad = slice * 8u + i % 8u;
        let at = ((row0 + m / {{ nq }}u) * {{ n_heads }}u + head0 + m % {{ nq }}u) * {{ quads }}u;
        # if head_dim % 32
        qs[i % 8u * {{ M + 1 }}u + i / 8u] = select(vec4<f32>(), q[at + min(quad, {{ quads - 1 }}u)] * {{ "%.9g" % scale }}, quad < {{ quads }}u);
        # else
        qs[i % 8u * {{ M + 1 }}u + i / 8u] = q[at + quad] * {{ "%.9g" % scale }};
        # endif
      }
      for (var i = lid; i < {{ 4 * N }}u; i += {{ wg }}u) {
        let key = i / 4u;
        let p = min(here + key, high - 1u);
        let page = page_of(p, table, kv_head);
        let eight = decoded(k_raw(page, p % {{ block_size }}u, {{ "min(slice * 4u + i %% 4u, %du)" % (units - 1) if head_dim % 32 else "slice * 4u + i % 4u" }}));
        let to = i % 4u * {{ 2 * (N + 1) }}u + key / {{ 4 * tn }}u * {{ 4 * tn }}u + key % 4u * {{ tn }}u + key % {{ 4 * tn }}u / 4u;
        kvs[to] = eight.a;
        kvs[to + {{ N + 1 }}u] = eight.b;
      }
      workgroupBarrier();
      for (var quad = 0u; quad < 8u; quad++) {
        # for i in range(mr)
        let q{{ i }} = qs[quad * {{ M + 1 }}u + tm + {{ i * tm }}u];
        # endfor
        # for j in range(nr)
        {
          let kk = kvs[quad * {{ N + 1 }}u + {{ j // 4 * 4 * tn + j % 4 * tn }}u + tn];
          # for i in range(mr)
          s{{ i }}_{{ j // 4 }}[{{ j % 4 }}] += dot(q{{ i }}, kk);
          # endfor
        }
        # endfor
      }
      workgroupBarrier();
    }
    # for i in range(mr)
    # for j in range(nr // 4)
    {
      # if softcap
      s{{ i }}_{{ j }} = tanh(clamp(s{{ i }}_{{ j }} / {{ "%.9g" % softcap }}, vec4<f32>(-15.0), vec4<f32>(15.0))) * {{ "%.9g" % softcap }};
      # endif
      let p = vec4<u32>(here + {{ 4 * tn * j }}u + 4u * tn) + vec4<u32>(0u, 1u, 2u, 3u);
      s{{ i }}_{{ j }} = select(vec4<f32>(NEVER), s{{ i }}_{{ j }}, (p <= vec4<u32>(min(seen{{ i }}, high - 1u))){{ " & (p + %du > vec4<u32>(seen%d))" % (window, i) if window }});
    }
    # endfor
    # set all = namespace(text="s%d_0" % i)
    # for j in range(1, nr // 4)
    # set all.text = "max(%s, s%d_%d)" % (all.text, i, j)
    # endfor
    let best{{ i }} = {{ all.text }};
    var max{{ i }} = max(max(best{{ i }}.x, best{{ i }}.y), max(best{{ i }}.z, best{{ i }}.w));
    # if shuffle
    # for mask in (1, 2, 4, 8) if mask < tn
    max{{ i }} = max(max{{ i }}, subgroupShuffleXor(max{{ i }}, {{ mask }}u));
    # endfor
    # else
    red[(tm + {{ i * tm }}u) * {{ tn }}u + tn] = max{{ i }};
    # endif
    # endfor
    # if not shuffle
    workgroupBarrier();
    # for i in range(mr)
    for (var other = 0u; other < {{ tn }}u; other++) {
      max{{ i }} = max(max{{ i }}, red[(tm + {{ i * tm }}u) * {{ tn }}u + other]);
    }
    # endfor
    # endif
    # for i in range(mr)
    {
      let highest = max(top{{ i }}, max{{ i }});
      let keep = exp(top{{ i }} - highest);
      top{{ i }} = highest;
      sum{{ i }} *= keep;
      # for j in range(dv)
      acc{{ i }}_{{ j }} *= keep;
      # endfor
      # for j in range(nr // 4)
      let w{{ j }} = select(exp(s{{ i }}_{{ j }} - highest), vec4<f32>(), s{{ i }}_{{ j }} == vec4<f32>(NEVER));
      sum{{ i }} += w{{ j }}.x + w{{ j }}.y + w{{ j }}.z + w{{ j }}.w;
      ps[(tm + {{ i * tm }}u) * {{ N // 4 + 1 }}u + {{ tn * j }}u + tn] = w{{ j }};
      # endfor
    }
    # endfor
    for (var t0 = 0u; t0 < {{ N }}u; t0 += {{ keys }}u) {
      for (var i = lid; i < {{ keys * units }}u; i += {{ wg }}u) {
        let p = min(here + t0 + i / {{ units }}u, high - 1u);
        let page = page_of(p, table, kv_head);
        let eight = decoded(v_raw(page, p % {{ block_size }}u, i % {{ units }}u));
        kvs[2u * i] = eight.a;
        kvs[2u * i + 1u] = eight.b;
      }
      workgroupBarrier();
      for (var quad = 0u; quad < {{ keys // 4 }}u; quad++) {
        # for i in range(mr)
        let w{{ i }} = ps[(tm + {{ i * tm }}u) * {{ N // 4 + 1 }}u + t0 / 4u + quad];
        # endfor
        # for c in range(4)
        # for j in range(dv)
        {
          let vv = kvs[(4u * quad + {{ c }}u) * {{ quads }}u + {{ "min(tn + %du, %du)" % (tn * j, quads - 1) if tail and j == dv - 1 else "tn + %du" % (tn * j) }}];
          # for i in range(mr)
          acc{{ i }}_{{ j }} += w{{ i }}[{{ c }}] * vv;
          # endfor
        }
        # endfor
        # endfor
      }
      workgroupBarrier();
    }
  }
  # for i in range(mr)
  # if shuffle
  # for mask in (1, 2, 4, 8) if mask < tn
  sum{{ i }} += subgroupShuffleXor(sum{{ i }}, {{ mask }}u);
  # endfor
  # else
  red[(tm + {{ i * tm }}u) * {{ tn }}u + tn] = sum{{ i }};
  # endif
  # endfor
  # if not shuffle
  workgroupBarrier();
  # for i in range(mr)
  sum{{ i }} = 0.0;
  for (var other = 0u; other < {{ tn }}u; other++) {
    sum{{ i }} += red[(tm + {{ i * tm }}u) * {{ tn }}u + other];
  }
  # endfor
  # endif
  # for i in range(mr)
  {
    let m = tm + {{ i * tm }}u;
    if (m < count * {{ nq }}u) {
      let head = head0 + m % {{ nq }}u;
      # if splits > 1
      let at = (((row0 + m / {{ nq }}u) * {{ n_heads }}u + head) * {{ splits }}u + wid.z) * {{ quads + 1 }}u;
      if (tn == 0u) {
        out[at + {{ quads }}u] = vec4<f32>(top{{ i }}, sum{{ i }}, 0.0, 0.0);
      }
      # set times = ""
      # else
      let at = ((row0 + m / {{ nq }}u) * {{ n_heads }}u + head) * {{ quads }}u;
      var factor = 1.0 / sum{{ i }};
      # if sinks
      let highest = max(top{{ i }}, sinks[head]);
      let keep = exp(top{{ i }} - highest);
      factor = keep / (sum{{ i }} * keep + exp(sinks[head] - highest));
      # endif
      # set times = " * factor"
      # endif
      # for j in range(dv)
      # if tail and j == dv - 1
      if (tn + {{ tn * j }}u < {{ quads }}u) {
        out[at + tn + {{ tn * j }}u] = acc{{ i }}_{{ j }}{{ times }};
      }
      # else
      out[at + tn + {{ tn * j }}u] = acc{{ i }}_{{ j }}{{ times }};
      # endif
      # endfor
    }
  }
  # endfor
}
