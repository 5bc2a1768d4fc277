// Causal attention of single rows over the paged KV cache with online softmax (Dao et al., FlashAttention; Flash-Decoding
// where the context is split), one workgroup per (row, `nq` query heads of one kv head, split of the context).
// `lanes` threads share a key and have `batch` keys next to each other, a workgroup a chunk of keys. Subgroups go through
// the chunks by themselves, each with a maximum of its own, and meet at the end: scores and weights stay in registers.
// Without subgroups a chunk passes three phases between barriers: scores, softmax, sums of values.
// step;  q (n_rows, n_heads * head_dim) f32;  k, v (n_blocks, n_kv) pages as in `lib/pages.wgsl`
// [sinks (n_heads,) f32: a logit per head that takes part in the softmax and has no value]
// out (n_rows, n_heads * head_dim) f32, or with splits > 1 the parts for `attention_merge`
//     (n_rows, n_heads, splits, head_dim + 4) f32: sums, maximum, denominator, two unused; empty splits are not written;
//     of single rows by sequence, (n_seqs, ...), as a sequence has one at most;
//     or with `to_bytes` and one split rows of lib/ints.wgsl: takes subgroups of 8 or more and heads of whole chunks
// `fused`, where no sequence has two rows: instead of q come qkv, turns, [q_weight, k_weight] as in `rope_store`, whose
//     work is done here, and k and v are written.
// `rows`: "all" rows of the step, or the "single" ones, which are tiles of one row (`attention_tiles` has the others).
// `window`: a row sees so many positions up to its own (0: all).  `softcap`: scores become tanh(s / softcap) * softcap.
// `share`: the least that a split takes, a multiple of block_size.  `room`: values of workgroup memory for the last sums.
// `batch` divides block_size.  `sure`: there is one row, whatever the step says.
// constants: n_heads, n_kv, head_dim, kv, block_size, scale, softcap, window, ring, sinks, fused, [norm, eps, rot_dim, neox,
// magnitude,] rows, splits, share, sure, to_bytes, nq, wg, lanes, batch, room, subgroup, st
// grid: (rows or tiles, n_heads / nq, splits)
# import "lib/pages.wgsl" as pages
# import "lib/quantise.wgsl" as quantise
# import "lib/rope.wgsl" as rope
# set group = n_heads // n_kv
# set units = head_dim // 8
# set quads = head_dim // 4
# set upl = (units + lanes - 1) // lanes
# set tail = units % lanes
# set places = wg // lanes
# set chunk = batch * places
# set shuffle = subgroup >= lanes
# set scaled = kv == "q8_0"
# set m = batch * nq
# set wide = [wg // nq, subgroup if shuffle else chunk, 32] | min
# set team = 32 if wide >= 32 else (16 if wide >= 16 else (8 if wide >= 8 else 4))
# set per = 8 if 8 * (nq + 1) <= wg else 4
# set parts = wg // subgroup if shuffle else places
# set kept = [parts, room // (nq * head_dim)] | min
# set partials = 0 if shuffle else m * lanes * (places + 1)
# if shuffle
# set ns = namespace(mask=lanes // 2, keys=batch, heads=nq, steps=[])
# for _ in range(6) if ns.mask > 0
# if ns.heads % 2 == 0
# set ns.heads = ns.heads // 2
# set ns.steps = ns.steps + [(ns.mask, "heads", ns.heads)]
# elif ns.keys > 1
# set ns.keys = ns.keys // 2
# set ns.steps = ns.steps + [(ns.mask, "keys", ns.keys)]
# else
# set ns.steps = ns.steps + [(ns.mask, "none", 0)]
# endif
# set ns.mask = ns.mask // 2
# endfor
# set steps, keys_each, heads_each = ns.steps, ns.keys, ns.heads
# endif
# set in_bytes = to_bytes and splits == 1
{{ "enable subgroups;" if shuffle or in_bytes }}
{{ bind("step", "u32") }}
# if fused
{{ bind("qkv", "f32") }}
{{ bind("turns", "u32") }}
# if norm
{{ bind("q_weight", "f32") }}
{{ bind("k_weight", "f32") }}
# endif
# else
{{ bind("q", "f32") }}
# endif
{{ bind("k", pages.element(kv), "read_write" if fused else "read") }}
{{ bind("v", pages.element(kv), "read_write" if fused else "read") }}
# if sinks
{{ bind("sinks", "f32") }}
# endif
{{ bind("out", "u32" if in_bytes else "vec4<f32>", "read_write") }}
{{ quantise.functions() if in_bytes }}

const NEVER = -1e30;

var<workgroup> qs: array<f32, {{ nq * head_dim }}>;
# if shuffle
var<workgroup> red: array<f32, {{ (nq + 1) * per }}>;
var<workgroup> stats: array<vec2<f32>, {{ nq * parts }}>;  // maximum and denominator of each subgroup, then its factor
# else
var<workgroup> scores: array<f32, {{ nq * chunk }}>;
var<workgroup> red: array<f32, {{ [nq * team, (nq + 1) * per] | max }}>;
var<workgroup> keeps: array<f32, {{ nq }}>;
# endif
var<workgroup> finals: array<vec4<f32>, {{ nq }}>;  // maximum, denominator; factors of the sums, of the own value
var<workgroup> sums: array<vec4<f32>, {{ kept * nq * quads }}>;  // of each unit the first half, then of each the second
# if not shuffle
var<workgroup> partial: array<f32, {{ partials }}>;
# endif

{{ pages.types(kv) }}
{{ pages.reads("k", kv, head_dim, block_size) }}
{{ pages.reads("v", kv, head_dim, block_size) }}
{{ pages.page_of(kv, n_kv, head_dim, block_size, ring) }}
# if fused
var<workgroup> fresh: array<f32, {{ 2 * head_dim }}>;  // the row's own key and value

{{ pages.makes(kv, head_dim) }}
{{ pages.rounds(kv) }}
{{ pages.writes("k", kv, head_dim, block_size) }}
{{ pages.writes("v", kv, head_dim, block_size) }}
{{ rope.functions(head_dim, rot_dim, neox, magnitude) }}
# endif

// Where value d of a head is in `qs`: the first values of all units, then the second ones.
fn plane(d: u32) -> u32 {
  return d % 8u * {{ units }}u + d / 8u;
}

@compute @workgroup_size({{ wg }})
fn main(@builtin(workgroup_id) wid: vec3<u32>, @builtin(local_invocation_index) lid: u32) {
  # if rows == "single"
  if (wid.x >= step[{{ st.N_TILES }}]) {
    return;
  }
  let tile = step[{{ st.tiles }}u + wid.x];
  if ((tile >> 16u) > 1u) {
    return;
  }
  let row = tile & 0xffffu;
  # else
  let row = wid.x;
  # if not sure
  if (row >= step[{{ st.N_ROWS }}]) {
    return;
  }
  # endif
  # endif
  let seq = step[{{ st.row_seqs }}u + row];
  let table = {{ pages.table_of("seq", ring, st) }};
  let position = step[{{ st.positions }}u + row];
  let end = position + 1u;
  # if window
  let start = (max(end, {{ window }}u) - {{ window }}u) / {{ block_size }}u * {{ block_size }}u;
  # else
  let start = 0u;
  # endif
  # if splits > 1
  let share = max({{ share }}u, (end - start + {{ splits * block_size - 1 }}u) / {{ splits * block_size }}u * {{ block_size }}u);
  let low = start + wid.z * share;
  if (low >= end) {
    return;
  }
  let high = min(low + share, {{ "position" if fused else "end" }});
  # else
  let low = start;
  let high = {{ "position" if fused else "end" }};
  # endif
  # if fused
  let own = {{ "low + share >= end" if splits > 1 else "true" }};  // has the row's own key, which is not read from the pages
  # endif
  let last = max(high, 1u) - 1u;
  let head0 = wid.y * {{ nq }}u;
  let kv_head = head0 / {{ group }}u;
  let lane = lid % {{ lanes }}u;
  let place = lid / {{ lanes }}u;

  # for name in ("k", "v")
  # for b in range(batch)
  # for j in range(upl)
  var {{ name }}{{ b }}_{{ j }}: Raw;
  # endfor
  # endfor
  # endfor
  # for j in range(upl)
  let unit{{ j }} = {{ "min(lane + %du, %du)" % (j * lanes, units - 1) if tail and j == upl - 1 else "lane + %du" % (j * lanes) }};
  # endfor
  # macro load(name, first)
  {
    let p = min({{ first }} + place * {{ batch }}u, last);
    let page = page_of(p, table, kv_head);
    # for b in range(batch)
    # for j in range(upl)
    {{ name }}{{ b }}_{{ j }} = {{ name }}_raw(page, p % {{ block_size }}u + {{ "min(%du, last - p)" % b if b else "0u" }}, unit{{ j }});
    # endfor
    # endfor
  }
  # endmacro
  {{ load("k", "low") }}
  {{ load("v", "low") }}

  # if fused
  let base = row * {{ (n_heads + 2 * n_kv) * head_dim }}u;
  # if norm
  if (lid < {{ (nq + 1) * per }}u) {
    let n = lid / {{ per }}u;
    let at = base + select({{ n_heads }}u + kv_head, head0 + n, n < {{ nq }}u) * {{ head_dim }}u + lid % {{ per }}u;
    var squares = 0.0;
    # for i in range(0, head_dim, per)
    let x{{ i }} = qkv[at + {{ i }}u];
    # endfor
    # for i in range(0, head_dim, per)
    squares += x{{ i }} * x{{ i }};
    # endfor
    red[lid] = squares;
  }
  workgroupBarrier();
  # endif
  // the queries and the key, then the value
  # set items = (nq + 1) * head_dim
  # set each = (items + wg - 1) // wg
  # for i in range(each)
  let n{{ i }} = min((lid + {{ i * wg }}u) / {{ head_dim }}u, {{ nq }}u);
  let d{{ i }} = (lid + {{ i * wg }}u) % {{ head_dim }}u;
  let o{{ i }} = partner(d{{ i }});
  let at{{ i }} = base + select({{ n_heads }}u + kv_head, head0 + n{{ i }}, n{{ i }} < {{ nq }}u) * {{ head_dim }}u;
  let first{{ i }} = qkv[at{{ i }} + d{{ i }}];
  let second{{ i }} = qkv[at{{ i }} + o{{ i }}];
  # endfor
  # for i in range((head_dim + wg - 1) // wg)
  let value{{ i }} = qkv[base + ({{ n_heads + n_kv }}u + kv_head) * {{ head_dim }}u + min(lid + {{ i * wg }}u, {{ head_dim - 1 }}u)];
  # endfor
  # for i in range(each)
  {{ "if (own) {" if i * wg >= nq * head_dim else "{" }}
    # if norm
    var squares = 0.0;
    # for j in range(per)
    squares += red[n{{ i }} * {{ per }}u + {{ j }}u];
    # endfor
    let factor = inverseSqrt(squares / {{ head_dim }}.0 + {{ "%.9g" % eps }});
    let a = first{{ i }} * factor * select(k_weight[d{{ i }}], q_weight[d{{ i }}], n{{ i }} < {{ nq }}u);
    let b = second{{ i }} * factor * select(k_weight[o{{ i }}], q_weight[o{{ i }}], n{{ i }} < {{ nq }}u);
    # else
    let a = first{{ i }};
    let b = second{{ i }};
    # endif
    let value = turned(a, b, d{{ i }}, position);
    if (n{{ i }} < {{ nq }}u) {
      qs[n{{ i }} * {{ head_dim }}u + plane(d{{ i }})] = value * {{ "%.9g" % scale }};
    }{{ " else if (lid + %du < %du) {" % (i * wg, items) if items % wg and i == each - 1 else " else {" }}
      fresh[d{{ i }}] = rounded(value);
    }
  }
  # endfor
  # for i in range((head_dim + wg - 1) // wg)
  if (lid + {{ i * wg }}u < {{ head_dim }}u) {
    fresh[lid + {{ head_dim + i * wg }}u] = rounded(value{{ i }});
  }
  # endfor
  # else
  for (var i = lid; i < {{ nq * head_dim }}u; i += {{ wg }}u) {
    let to = i / {{ head_dim }}u * {{ head_dim }}u + plane(i % {{ head_dim }}u);
    qs[to] = q[(row * {{ n_heads }}u + head0) * {{ head_dim }}u + i] * {{ "%.9g" % scale }};
  }
  # endif
  workgroupBarrier();
  // A lane's local heads are in such an order that in each exchange of heads it keeps the first half.
  # for n in range(nq)
  # set of = namespace(head="0u", rest=n)
  # if shuffle
  # for mask, kind, half in steps if kind == "heads"
  # set upper = of.rest >= half
  # set of.head = of.head + " + select(%du, %du, (lane & %du) != 0u)" % (half if upper else 0, 0 if upper else half, mask)
  # set of.rest = of.rest % half
  # endfor
  # endif
  let held{{ n }} = {{ of.head }} + {{ of.rest if shuffle else n }}u;
  # for j in range(upl)
  # for h in range(2)
  var q{{ n }}_{{ j }}{{ "ab"[h] }} = vec4<f32>(
    # for i in range(4)
    qs[held{{ n }} * {{ head_dim }}u + {{ (4 * h + i) * units }}u + unit{{ j }}],
    # endfor
  );
  # if tail and j == upl - 1
  q{{ n }}_{{ j }}{{ "ab"[h] }} *= select(0.0, 1.0, lane + {{ j * lanes }}u < {{ units }}u);
  # endif
  var acc{{ n }}_{{ j }}{{ "ab"[h] }} = vec4<f32>();
  # endfor
  # endfor
  # endfor
  # if fused
  // the row's own key and value go into the pages, from the workgroup of the last split and the first heads
  let keeps_own = lid < {{ 2 * units }}u && own;
  let of_v = lid / {{ units }}u;
  var scales: Scales;
  if (keeps_own) {
    scales = scales_of(of_v * {{ head_dim }}u, lid % {{ units }}u);
  }
  # if kv == "q8_0"
  workgroupBarrier();
  # endif
  if (keeps_own) {
    let raw = made(fresh_unit(8u * lid), scales);
    # if kv == "q8_0"
    let back = decoded(raw);
    # for i in range(4)
    fresh[8u * lid + {{ i }}u] = back.a[{{ i }}];
    fresh[8u * lid + {{ i + 4 }}u] = back.b[{{ i }}];
    # endfor
    # endif
    if (head0 % {{ group }}u == 0u) {
      let page = page_of(position, table, kv_head);
      if (of_v == 0u) {
        k_write(page, position % {{ block_size }}u, lid % {{ units }}u, raw, scales);
      } else {
        v_write(page, position % {{ block_size }}u, lid % {{ units }}u, raw, scales);
      }
    }
  }
  # if kv == "q8_0"
  workgroupBarrier();
  # endif
  # endif
  let member = lid % {{ team }}u;
  let mine = min(lid / {{ team }}u, {{ nq - 1 }}u);
  let in_team = lid < {{ nq * team }}u;
  # macro own_of()
  # if fused
  var own_score = 0.0;
  if (own) {
  # for i in range(0, head_dim, team)
    {{ "if (member < %du) {" % (head_dim - i) if i + team > head_dim else "{" }}
      own_score += qs[mine * {{ head_dim }}u + plane({{ i }}u + member)] * fresh[{{ i }}u + member];
    }
  # endfor
  # if shuffle
  # for mask in (1, 2, 4, 8, 16) if mask < team
    own_score += subgroupShuffleXor(own_score, {{ mask }}u);
  # endfor
  # else
  # if norm
    workgroupBarrier();
  # endif
    if (in_team) {
      red[lid] = own_score;
    }
    workgroupBarrier();
    own_score = 0.0;
  # for i in range(team)
    own_score += red[mine * {{ team }}u + {{ i }}u];
  # endfor
    workgroupBarrier();
  # endif
  # if softcap
    own_score = tanh(clamp(own_score / {{ "%.9g" % softcap }}, -15.0, 15.0)) * {{ "%.9g" % softcap }};
  # endif
  }
  # endif
  # endmacro
  # if shuffle
  // The sums over the lanes, of each key and head, come to lie apart: with each exchange a thread gives away half.
  let from_lane = lid % {{ subgroup }}u / {{ lanes }}u * {{ lanes }}u;
  # set of = namespace(key="0u")
  # for mask, kind, half in steps if kind == "keys"
  # set of.key = of.key + " + select(0u, %du, (lane & %du) != 0u)" % (half, mask)
  # endfor
  let my_key = place * {{ batch }}u + {{ of.key }};
  # for n in range(heads_each)
  var top{{ n }} = NEVER;
  var sum{{ n }} = 0.0;
  # endfor
  # else
  var top = NEVER;
  var sum = 0.0;
  {{ own_of() }}
  # endif
  # macro lane_of(b, n)
  # set of = namespace(lane=0)
  # for mask, kind, half in steps
  # if kind == "keys" and b % (2 * half) >= half or kind == "heads" and n % (2 * half) >= half
  # set of.lane = of.lane + mask
  # endif
  # endfor
  {{ of.lane }}
  # endmacro
  # macro decode(name, apart=false)
  # for b in range(batch)
  # for j in range(upl)
  let e{{ b }}_{{ j }} = {{ "unscaled" if apart and scaled else "decoded" }}({{ name }}{{ b }}_{{ j }});
  # if apart and scaled
  let scale{{ b }}_{{ j }} = scale_of({{ name }}{{ b }}_{{ j }});
  # endif
  # endfor
  # endfor
  # endmacro

  # if shuffle
  for (var here = low; here < high; here += {{ chunk }}u) {
    let again = here + {{ chunk }}u < high;
    # for b in range(batch)
    # for n in range(nq)
    var s{{ b }}_{{ n }} = 0.0;
    # endfor
    # endfor
    {
      {{ decode("k", true) }}
      # for b in range(batch)
      # for n in range(nq)
      # for j in range(upl)
      s{{ b }}_{{ n }} += {{ "(" if scaled }}dot(q{{ n }}_{{ j }}a, e{{ b }}_{{ j }}.a) + dot(q{{ n }}_{{ j }}b, e{{ b }}_{{ j }}.b){{ ") * scale%d_%d" % (b, j) if scaled }};
      # endfor
      # endfor
      # endfor
    }
    # set left = namespace(keys=batch, heads=nq)
    # for mask, kind, half in steps
    # if kind == "none"
    # for b in range(left.keys)
    # for n in range(left.heads)
    s{{ b }}_{{ n }} += subgroupShuffleXor(s{{ b }}_{{ n }}, {{ mask }}u);
    # endfor
    # endfor
    # else
    # if kind == "heads"
    # for b in range(left.keys)
    # for n in range(half)
    s{{ b }}_{{ n }} += subgroupShuffleXor(s{{ b }}_{{ n + half }}, {{ mask }}u);
    # endfor
    # endfor
    # else
    {
      let upper = (lane & {{ mask }}u) != 0u;
      # for b in range(half)
      # for n in range(left.heads)
      # set this, other = "s%d_%d" % (b, n), "s%d_%d" % (b + half, n)
      {{ this }} = select({{ this }}, {{ other }}, upper) + subgroupShuffleXor(select({{ other }}, {{ this }}, upper), {{ mask }}u);
      # endfor
      # endfor
    }
    # endif
    # set left.keys = half if kind == "keys" else left.keys
    # set left.heads = half if kind == "heads" else left.heads
    # endif
    # endfor
    # for n in range(heads_each)
    var best{{ n }} = top{{ n }};
    # for b in range(keys_each)
    # if softcap
    s{{ b }}_{{ n }} = tanh(clamp(s{{ b }}_{{ n }} / {{ "%.9g" % softcap }}, -15.0, 15.0)) * {{ "%.9g" % softcap }};
    # endif
    s{{ b }}_{{ n }} = select(NEVER, s{{ b }}_{{ n }}, here + my_key + {{ b }}u < high{{ " && here + my_key + %du > position" % (window + b) if window }});
    best{{ n }} = max(best{{ n }}, s{{ b }}_{{ n }});
    # endfor
    # for mask, kind, half in steps if kind == "keys"
    best{{ n }} = max(best{{ n }}, subgroupShuffleXor(best{{ n }}, {{ mask }}u));
    # endfor
    # set ns = namespace(mask=lanes)
    # for _ in range(6) if ns.mask < subgroup
    best{{ n }} = max(best{{ n }}, subgroupShuffleXor(best{{ n }}, {{ ns.mask }}u));
    # set ns.mask = ns.mask * 2
    # endfor
    let keep{{ n }} = exp(top{{ n }} - best{{ n }});
    top{{ n }} = best{{ n }};
    sum{{ n }} *= keep{{ n }};
    # for b in range(keys_each)
    s{{ b }}_{{ n }} = select(exp(s{{ b }}_{{ n }} - best{{ n }}), 0.0, s{{ b }}_{{ n }} == NEVER);
    sum{{ n }} += s{{ b }}_{{ n }};
    # endfor
    # endfor
    # for n in range(nq)
    {
      let keep = subgroupShuffle(keep{{ n % heads_each }}, from_lane + {{ lane_of(0, n) | trim }}u);
      # for j in range(upl)
      acc{{ n }}_{{ j }}a *= keep;
      acc{{ n }}_{{ j }}b *= keep;
      # endfor
    }
    # endfor
    {
      {{ decode("v", true) }}
      # for b in range(batch)
      # for n in range(nq)
      {
        let w = subgroupShuffle(s{{ b % keys_each }}_{{ n % heads_each }}, from_lane + {{ lane_of(b, n) | trim }}u);
        # for j in range(upl)
        # if scaled
        let w{{ j }} = w * scale{{ b }}_{{ j }};
        # endif
        # set times = "w%d" % j if scaled else "w"
        acc{{ n }}_{{ j }}a += {{ times }} * e{{ b }}_{{ j }}.a;
        acc{{ n }}_{{ j }}b += {{ times }} * e{{ b }}_{{ j }}.b;
        # endfor
      }
      # endfor
      # endfor
    }
    if (again) {
      {{ load("k", "here + %du" % chunk) }}
      {{ load("v", "here + %du" % chunk) }}
    }
  }
  # else
  for (var here = low; here < high; here += {{ chunk }}u) {
    let again = here + {{ chunk }}u < high;
    {
      {{ decode("k") }}
      # for b in range(batch)
      # for n in range(nq)
      var s{{ b * nq + n }} = 0.0;
      # for j in range(upl)
      s{{ b * nq + n }} += dot(q{{ n }}_{{ j }}a, e{{ b }}_{{ j }}.a) + dot(q{{ n }}_{{ j }}b, e{{ b }}_{{ j }}.b);
      # endfor
      # endfor
      # endfor
      if (again) {
        {{ load("k", "here + %du" % chunk) }}
      }
      # for i in range(m)
      partial[({{ i * lanes }}u + lane) * {{ places + 1 }}u + place] = s{{ i }};
      # endfor
      workgroupBarrier();
      for (var i = lid; i < {{ places * m }}u; i += {{ wg }}u) {
        let value = i / {{ places }}u;
        var total = 0.0;
        # for i in range(lanes)
        total += partial[(value * {{ lanes }}u + {{ i }}u) * {{ places + 1 }}u + i % {{ places }}u];
        # endfor
        scores[value % {{ nq }}u * {{ chunk }}u + i % {{ places }}u * {{ batch }}u + value / {{ nq }}u] = total;
      }
    }
    workgroupBarrier();
    {
      var best = NEVER;
      # for i in range(chunk // team)
      var x{{ i }} = NEVER;
      # endfor
      if (in_team) {
        # for i in range(chunk // team)
        x{{ i }} = scores[mine * {{ chunk }}u + {{ i * team }}u + member];
        # endfor
      }
      # for i in range(chunk // team)
      {
        # if softcap
        x{{ i }} = tanh(clamp(x{{ i }} / {{ "%.9g" % softcap }}, -15.0, 15.0)) * {{ "%.9g" % softcap }};
        # endif
        let p = here + {{ i * team }}u + member;
        x{{ i }} = select(NEVER, x{{ i }}, p < high{{ " && p + %du > position" % window if window }});
        best = max(best, x{{ i }});
      }
      # endfor
      if (in_team) {
        red[lid] = best;
      }
      workgroupBarrier();
      # for i in range(team)
      best = max(best, red[mine * {{ team }}u + {{ i }}u]);
      # endfor
      best = max(best, top);
      let keep = exp(top - best);
      top = best;
      sum *= keep;
      # for i in range(chunk // team)
      x{{ i }} = select(exp(x{{ i }} - best), 0.0, x{{ i }} == NEVER);
      sum += x{{ i }};
      # endfor
      if (in_team) {
        # for i in range(chunk // team)
        scores[mine * {{ chunk }}u + {{ i * team }}u + member] = x{{ i }};
        # endfor
        if (member == 0u) {
          keeps[mine] = keep;
        }
      }
    }
    workgroupBarrier();
    {
      {{ decode("v") }}
      # for n in range(nq)
      # for j in range(upl)
      acc{{ n }}_{{ j }}a *= keeps[{{ n }}];
      acc{{ n }}_{{ j }}b *= keeps[{{ n }}];
      # endfor
      # for b in range(batch)
      {
        let w = scores[{{ n * chunk + b }}u + place * {{ batch }}u];
        # for j in range(upl)
        acc{{ n }}_{{ j }}a += w * e{{ b }}_{{ j }}.a;
        acc{{ n }}_{{ j }}b += w * e{{ b }}_{{ j }}.b;
        # endfor
      }
      # endfor
      # endfor
    }
    if (again) {
      {{ load("v", "here + %du" % chunk) }}
      workgroupBarrier();
    }
  }
  # endif
  # if shuffle
  {{ own_of() }}
  let part = lid / {{ subgroup }}u;
  # for n in range(heads_each)
  # for mask, kind, half in steps if kind == "keys"
  sum{{ n }} += subgroupShuffleXor(sum{{ n }}, {{ mask }}u);
  # endfor
  # set ns = namespace(mask=lanes)
  # for _ in range(6) if ns.mask < subgroup
  sum{{ n }} += subgroupShuffleXor(sum{{ n }}, {{ ns.mask }}u);
  # set ns.mask = ns.mask * 2
  # endfor
  # endfor
  # for n in range(nq)
  if (lid % {{ subgroup }}u == {{ lane_of(0, n) | trim }}u) {
    stats[{{ n * parts }}u + part] = vec2<f32>(top{{ n % heads_each }}, sum{{ n % heads_each }});
  }
  # endfor
  workgroupBarrier();
  var top = NEVER;
  var sum = 0.0;
  # for i in range(0, parts, team)
  let stat{{ i }} = stats[mine * {{ parts }}u + {{ "min(%du + member, %du)" % (i, parts - 1) if parts % team else "%du + member" % i }}];
  top = max(top, stat{{ i }}.x);
  # endfor
  # for mask in (1, 2, 4, 8, 16) if mask < team
  top = max(top, subgroupShuffleXor(top, {{ mask }}u));
  # endfor
  workgroupBarrier();
  # for i in range(0, parts, team)
  {{ "if (in_team && %du + member < %du) {" % (i, parts) if parts % team else "if (in_team) {" }}
    let factor = exp(stat{{ i }}.x - top);
    stats[mine * {{ parts }}u + {{ i }}u + member].x = factor;
    sum += factor * stat{{ i }}.y;
  }
  # endfor
  # for mask in (1, 2, 4, 8, 16) if mask < team
  sum += subgroupShuffleXor(sum, {{ mask }}u);
  # endfor
  # else
  workgroupBarrier();
  if (in_team) {
    red[lid] = sum;
  }
  workgroupBarrier();
  sum = 0.0;
  # for i in range(team)
  sum += red[mine * {{ team }}u + {{ i }}u];
  # endfor
  # endif
  if (in_team && member == 0u) {
    # if fused
    let highest = max(top, own_score);
    let keep = select(1.0, exp(top - highest), own);
    let weight = select(0.0, exp(own_score - highest), own);
    finals[mine] = vec4<f32>(select(top, highest, own), sum * keep + weight, keep, weight);
    # else
    finals[mine] = vec4<f32>(top, sum, 1.0, 0.0);
    # endif
  }
  # if shuffle
  # set ns = namespace(mask=lanes)
  # for _ in range(6) if ns.mask < subgroup
  # for n in range(nq)
  # for j in range(upl)
  acc{{ n }}_{{ j }}a += subgroupShuffleXor(acc{{ n }}_{{ j }}a, {{ ns.mask }}u);
  acc{{ n }}_{{ j }}b += subgroupShuffleXor(acc{{ n }}_{{ j }}b, {{ ns.mask }}u);
  # endfor
  # endfor
  # set ns.mask = ns.mask * 2
  # endfor
  let has_part = lid % {{ subgroup }}u < {{ lanes }}u;
  workgroupBarrier();
  # for n in range(nq)
  {
    let factor = stats[{{ n * parts }}u + part].x;
    # for j in range(upl)
    acc{{ n }}_{{ j }}a *= factor;
    acc{{ n }}_{{ j }}b *= factor;
    # endfor
  }
  # endfor
  # else
  let part = place;
  let has_part = true;
  # endif
  # for first in range(0, parts, kept)
  # if first
  workgroupBarrier();
  # endif
  if (has_part && part >= {{ first }}u && part < {{ first + kept }}u) {
    # for n in range(nq)
    # for j in range(upl)
    {{ "if (lane + %du < %du) {" % (j * lanes, units) if tail and j == upl - 1 else "{" }}
      let to = (part - {{ first }}u) * {{ nq * quads }}u + {{ n * quads }}u + lane + {{ j * lanes }}u;
      sums[to] {{ "+" if first }}= acc{{ n }}_{{ j }}a;
      sums[to + {{ units }}u] {{ "+" if first }}= acc{{ n }}_{{ j }}b;
    }
    # endfor
    # endfor
  }
  # endfor
  workgroupBarrier();
  # for first in range(0, nq * quads, wg)
  {
    # set here = first + wg <= nq * quads
    let i = {{ "lid + %du" % first if here else "min(lid + %du, %du)" % (first, nq * quads - 1) }};
    let n = i / {{ quads }}u;
    let quad = i % {{ quads }}u;
    let from_sum = n * {{ quads }}u + quad % 2u * {{ units }}u + quad / 2u;
    var v = sums[from_sum];
    # for other in range(1, kept)
    v += sums[{{ other * nq * quads }}u + from_sum];
    # endfor
    let final_n = finals[n];
    # if fused
    let own_at = {{ head_dim }}u + 4u * quad;
    v = v * final_n.z + final_n.w * vec4<f32>(fresh[own_at], fresh[own_at + 1u], fresh[own_at + 2u], fresh[own_at + 3u]);
    # endif
    # if splits > 1
    let to = (({{ "seq" if rows == "single" else "row" }} * {{ n_heads }}u + head0 + n) * {{ splits }}u + wid.z) * {{ quads + 1 }}u;
    {{ "{" if here else "if (lid < %du) {" % (nq * quads - first) }}
      out[to + quad] = v;
      if (quad == 0u) {
        out[to + {{ quads }}u] = vec4<f32>(final_n.xy, 0.0, 0.0);
      }
    }
    # else
    # if sinks
    let highest = max(final_n.x, sinks[head0 + n]);
    let keep = exp(final_n.x - highest);
    v *= keep / (final_n.y * keep + exp(sinks[head0 + n] - highest));
    # else
    v /= final_n.y;
    # endif
    # if to_bytes
{{ quantise.chunk_of_lanes() }}
    # endif
    {{ "{" if here else "if (lid < %du) {" % (nq * quads - first) }}
      # if to_bytes
      let to = row * {{ 3 * n_heads * head_dim // 8 }}u;
      let at = head0 * {{ quads }}u + i;
{{ quantise.put_lane({"name": "out", "to": "to", "k": n_heads * head_dim}, "at", "") }}
      # else
      out[(row * {{ n_heads }}u + head0) * {{ quads }}u + i] = v;
      # endif
    }
    # endif
  }
  # endfor
}
