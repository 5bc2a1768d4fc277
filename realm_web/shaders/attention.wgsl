// Causal attention over the paged KV cache with online softmax (Dao et al., FlashAttention), one workgroup per
// (tile of `qt` query rows, kv head, split of the context); all query heads of the group share the loads of K and V.
// step;  q (n_rows, n_heads * head_dim) f32;  k, v (n_blocks, n_kv, block_size, head_dim) f16 or f32;
// out (n_rows, n_heads * head_dim) f32, or with splits > 1 the unmerged parts
//     (n_rows, n_heads, splits, head_dim + 2) f32: sums, then maximum and denominator (Flash-Decoding)
// [sinks (n_heads,) f32: a logit per head that takes part in the softmax and has no value]
// With `ring` the pages are those of rope_store's ring. `window`: a row sees so many positions up to its own (0: all).
// `softcap`: scores become tanh(s / softcap) * softcap.
// `kv`: the cache holds f16 (two to a u32) or f32.
// constants: n_heads, n_kv, head_dim, kv, block_size, scale, softcap, window, ring, sinks, qt, splits, wg, subgroup, st
// grid: (tiles, n_kv, splits)
# set group = n_heads // n_kv
# set nq = qt * group
# set vp = head_dim // 2
# set vpt = [vp, wg] | min
# set pg = wg // vpt
# set pp = (vp + wg - 1) // wg
# set reds = (wg // subgroup) if subgroup else ([8, wg // nq] | min)
{{ "enable subgroups;" if subgroup }}
{{ bind("step", "u32") }}
{{ bind("q", "vec4<f32>") }}
{{ bind("k", "vec4<u32>") }}
{{ bind("v", "u32") }}
# if sinks
{{ bind("sinks", "f32") }}
# endif
{{ bind("out", "vec2<f32>", "read_write") }}

const NEVER = -1e30;

// The i-th pair of values.
fn value_at(i: u32) -> vec2<f32> {
  # if kv == "f16"
  return unpack2x16float(v[i]);
  # else
  return bitcast<vec2<f32>>(vec2<u32>(v[2u * i], v[2u * i + 1u]));
  # endif
}

fn block_of(p: u32, table: u32) -> u32 {
  # if ring
  return table + p / {{ block_size }}u % {{ ring }}u;
  # else
  return step[table + p / {{ block_size }}u];
  # endif
}

var<workgroup> qs: array<vec4<f32>, {{ nq * head_dim // 4 }}>;
var<workgroup> probs: array<f32, {{ nq * wg }}>;
var<workgroup> tops: array<f32, {{ nq * reds }}>;
# if pg > 1
var<workgroup> others: array<vec2<f32>, {{ nq * vp }}>;
var<workgroup> other_sums: array<f32, {{ nq }}>;
# endif

@compute @workgroup_size({{ wg }})
fn main(@builtin(workgroup_id) wid: vec3<u32>, @builtin(local_invocation_index) lid: u32) {
  # if qt == 1
  let row0 = wid.x;
  let count = 1u;
  if (row0 >= step[{{ st.N_ROWS }}]) {
    return;
  }
  # else
  if (wid.x >= step[{{ st.N_TILES }}]) {
    return;
  }
  let tile = step[{{ st.tiles }}u + wid.x];
  let row0 = tile & 0xffffu;
  let count = tile >> 16u;
  # endif
  let seq = step[{{ st.row_seqs }}u + row0];
  # if ring
  let table = step[{{ st.seqs }}u + seq * {{ st.SEQ_WORDS }}u + {{ st.SLOT }}u] * {{ ring }}u;
  # else
  let table = {{ st.tables }}u + seq * {{ st.max_blocks }}u;
  # endif
  let position0 = step[{{ st.positions }}u + row0];
  let end = position0 + count;
  # if window
  let start = (max(position0 + 1u, {{ window }}u) - {{ window }}u) / {{ block_size }}u * {{ block_size }}u;
  # else
  let start = 0u;
  # endif
  # if splits > 1
  let share = (end - start + {{ splits * wg - 1 }}u) / {{ splits * wg }}u * {{ wg }}u;
  let low = start + wid.z * share;
  let high = min(low + share, end);
  # else
  let low = start;
  let high = end;
  # endif

  for (var i = lid; i < {{ nq * head_dim // 4 }}u; i += {{ wg }}u) {
    let n = i / {{ head_dim // 4 }}u;
    let r = min(n / {{ group }}u, count - 1u);
    let head = wid.y * {{ group }}u + n % {{ group }}u;
    qs[i] = q[((row0 + r) * {{ n_heads }}u + head) * {{ head_dim // 4 }}u + i % {{ head_dim // 4 }}u] * {{ "%.9g" % scale }};
  }
  # for n in range(nq)
  var top{{ n }} = NEVER;
  var sum{{ n }} = 0.0;
  # for j in range(pp)
  var acc{{ n }}_{{ j }} = vec2<f32>();
  # endfor
  # endfor
  let pair = lid % {{ vpt }}u;
  let part = lid / {{ vpt }}u;
  workgroupBarrier();

  for (var p0 = low; p0 < high; p0 += {{ wg }}u) {
    let p = p0 + lid;
    # for n in range(nq)
    var s{{ n }} = 0.0;
    # endfor
    if (p < high) {
      let block = block_of(p, table);
      let at = ((block * {{ n_kv }}u + wid.y) * {{ block_size }}u + p % {{ block_size }}u) * {{ head_dim // (8 if kv == "f16" else 4) }}u;
      for (var i = 0u; i < {{ head_dim // 8 }}u; i++) {
        # if kv == "f16"
        let kk = k[at + i];
        let a = vec4<f32>(unpack2x16float(kk.x), unpack2x16float(kk.y));
        let b = vec4<f32>(unpack2x16float(kk.z), unpack2x16float(kk.w));
        # else
        let a = bitcast<vec4<f32>>(k[at + 2u * i]);
        let b = bitcast<vec4<f32>>(k[at + 2u * i + 1u]);
        # endif
        # for n in range(nq)
        s{{ n }} += dot(qs[{{ n * head_dim // 4 }}u + 2u * i], a) + dot(qs[{{ n * head_dim // 4 + 1 }}u + 2u * i], b);
        # endfor
      }
    }
    # for n in range(nq)
    # if softcap
    s{{ n }} = tanh(clamp(s{{ n }} / {{ "%.9g" % softcap }}, -15.0, 15.0)) * {{ "%.9g" % softcap }};
    # endif
    # set seen = "p <= position0 + %du" % (n // group)
    # set near = " && p + %du > position0 + %du" % (window, n // group) if window else ""
    s{{ n }} = select(NEVER, s{{ n }}, p < high && {{ seen }}{{ near }});
    # endfor

    # if subgroup
    # for n in range(nq)
    let best{{ n }} = subgroupMax(s{{ n }});
    # endfor
    if (lid % {{ subgroup }}u == 0u) {
      # for n in range(nq)
      tops[{{ n * reds }}u + lid / {{ subgroup }}u] = best{{ n }};
      # endfor
    }
    # else
    # for n in range(nq)
    probs[{{ n * wg }}u + lid] = s{{ n }};
    # endfor
    workgroupBarrier();
    if (lid < {{ nq * reds }}u) {
      var best = NEVER;
      let first = (lid / {{ reds }}u) * {{ wg }}u + (lid % {{ reds }}u) * {{ wg // reds }}u;
      for (var i = 0u; i < {{ wg // reds }}u; i++) {
        best = max(best, probs[first + i]);
      }
      tops[lid] = best;
    }
    # endif
    workgroupBarrier();
    # for n in range(nq)
    {
      var best = top{{ n }};
      # for i in range(reds)
      best = max(best, tops[{{ n * reds + i }}]);
      # endfor
      let keep = exp(top{{ n }} - best);
      top{{ n }} = best;
      sum{{ n }} *= keep;
      # for j in range(pp)
      acc{{ n }}_{{ j }} *= keep;
      # endfor
      probs[{{ n * wg }}u + lid] = select(exp(s{{ n }} - best), 0.0, s{{ n }} == NEVER);
    }
    # endfor
    workgroupBarrier();
    if (part < {{ pg }}u) {
      let n_here = min({{ wg }}u, high - p0);
      for (var t0 = part * {{ block_size }}u; t0 < n_here; t0 += {{ pg * block_size }}u) {
        let block = block_of(p0 + t0, table);
        let at = (block * {{ n_kv }}u + wid.y) * {{ block_size * vp }}u;
        for (var t = 0u; t < min({{ block_size }}u, n_here - t0); t++) {
          # for j in range(pp)
          # if vp % wg and j == pp - 1
          let v{{ j }} = value_at(at + t * {{ vp }}u + min(pair + {{ j * wg }}u, {{ vp - 1 }}u));
          # else
          let v{{ j }} = value_at(at + t * {{ vp }}u + pair + {{ j * wg }}u);
          # endif
          # endfor
          # for n in range(nq)
          let w{{ n }} = probs[{{ n * wg }}u + t0 + t];
          sum{{ n }} += w{{ n }};
          # for j in range(pp)
          acc{{ n }}_{{ j }} += w{{ n }} * v{{ j }};
          # endfor
          # endfor
        }
      }
    }
    workgroupBarrier();
  }
  # if pg > 1
  # for other in range(1, pg)
  if (part == {{ other }}u) {
    # for n in range(nq)
    others[{{ n * vp }}u + pair] = acc{{ n }}_0;
    if (pair == 0u) {
      other_sums[{{ n }}] = sum{{ n }};
    }
    # endfor
  }
  workgroupBarrier();
  if (part == 0u) {
    # for n in range(nq)
    acc{{ n }}_0 += others[{{ n * vp }}u + pair];
    sum{{ n }} += other_sums[{{ n }}];
    # endfor
  }
  workgroupBarrier();
  # endfor
  # endif
  if (part > 0u) {
    return;
  }
  # for n in range(nq)
  if ({{ n // group }}u < count) {
    let head = (row0 + {{ n // group }}u) * {{ n_heads }}u + wid.y * {{ group }}u + {{ n % group }}u;
    # if splits == 1
    # if sinks
    let sink = sinks[wid.y * {{ group }}u + {{ n % group }}u];
    let highest = max(top{{ n }}, sink);
    let keep = exp(top{{ n }} - highest);
    sum{{ n }} = sum{{ n }} * keep + exp(sink - highest);
    # endif
    # for j in range(pp)
    if (pair + {{ j * wg }}u < {{ vp }}u) {
      out[head * {{ vp }}u + pair + {{ j * wg }}u] = acc{{ n }}_{{ j }}{{ " * keep" if sinks }} / sum{{ n }};
    }
    # endfor
    # else
    let at = (head * {{ splits }}u + wid.z) * {{ vp + 1 }}u;
    # for j in range(pp)
    if (pair + {{ j * wg }}u < {{ vp }}u) {
      out[at + pair + {{ j * wg }}u] = acc{{ n }}_{{ j }};
    }
    # endfor
    if (pair == 0u) {
      out[at + {{ vp }}u] = vec2<f32>(top{{ n }}, sum{{ n }});
    }
    # endif
  }
  # endfor
}
