// out[m, offset + n] = epilogue(sum_k w[n, k] * x[m, k]) for a few rows m: `lanes` threads share one weight row.
// step;  x (n_rows, k) f32, or with x_as "ints" rows of lib/ints.wgsl;  [norm (k,) f32];  weight (n, k) or (2n, k) with act;
// [bias (out_stride,) f32];  out (n_rows, out_stride) f32, which is added to with `residual`
// act "silu_mul", "gelu_mul": the epilogue's first value is w[n] . x (gate), its second w[n_total + n] . x (up).
// x_as "quantise": each workgroup brings its row of x into 8 bits by itself; "norm": and norms it first, with `eps`
// With out_as "ints" out is rows of lib/ints.wgsl: a workgroup then makes whole chunks of them, in subgroups of 8 or more.
// fmt2: the rows of weight from n1 on, a multiple of what a workgroup has, are of another format and bound after the others.
// constants: fmt, fmt2, n1, k, n, act, bias, residual, scale, softcap, out_stride, out_offset, per_seq (rows are sequences, not tokens),
// x_as, eps, out_as ("f32", "ints"), sure (there is one row, whatever the step says), st;
// tuning: m_tile rows of x at a time (1 if the workgroup makes its own); lanes per weight row; rows per lane group; wg threads;
// subgroup size or 0; of one row `unroll` times `run` neighbouring chunks of each weight row at a time; of more a chunk, where the next one's loads are
// under way `ahead`, and with `stage` the activations of a turn are in workgroup memory, for all groups; `table` bytes there for
// copies of the format's table (0: one copy, if it has one)
// grid: (ceil(n / (wg / lanes * rows)) folded at grid_x, ceil(n_rows / m_tile), fold)
# import "lib/epilogue.wgsl" as epilogue
# import "lib/ints.wgsl" as ints
# import "lib/quantise.wgsl" as quantise
# import "lib/lanes.wgsl" as sums
# import "lib/reduce.wgsl" as reduce
# set count = st.N_SEQS if per_seq else st.N_ROWS
# set own = x_as in ("quantise", "norm")
# set several = m_tile > 1 and x_as == "ints"
# set chunks = k // 32
# set parts = 2 if act else 1
# set groups = wg // lanes
# set n_acc = rows * m_tile * parts
# set in_subgroup = subgroup and lanes <= subgroup
# set across = subgroup and lanes > subgroup
# set partials = (wg // subgroup) if across else wg
{{ "enable subgroups;" if subgroup and (lanes > 1 or own or out_as == "ints") }}
{{ bind("step", "u32") }}
{{ bind("x", "vec4<u32>" if x_as == "ints" else "vec4<f32>") }}
{{ bind("norm", "vec4<f32>") if x_as == "norm" }}
{{ weight("w", fmt) if x_as == "f32" else weight_ints("w", fmt, wg, table, run) }}
{{ weight_ints("v", fmt2, wg) if fmt2 }}
# if out_as == "ints"
{{ epilogue.keep(bind, act, bias, scale, softcap, out_offset, m_tile, groups * rows) }}
{{ bind("out", "u32", "read_write") }}
# else
{{ epilogue.store(bind, st, n, act, bias, residual, scale, softcap, out_stride, out_offset, "" if sure else count) }}
# endif

# if own
{{ ints.own_activations("x", k) }}
{{ reduce.workgroup_reduce("sum", "add", wg, subgroup) if x_as == "norm" }}
# elif x_as == "ints"
{{ ints.staged_activations("x", k, m_tile, lanes) if several and stage else ints.activations("x", k) }}
# endif
{{ quantise.functions() if own or out_as == "ints" }}
# if lanes > 1 and not in_subgroup
var<workgroup> partial: array<f32, {{ partials * n_acc }}>;
# endif

@compute @workgroup_size({{ wg }})
fn main(@builtin(workgroup_id) wid: vec3<u32>, @builtin(num_workgroups) n_wg: vec3<u32>, @builtin(local_invocation_index) lid: u32) {
  let m0 = wid.y * {{ m_tile }}u;
  # if not sure
  if (m0 >= step[{{ count }}]) {
    return;
  }
  # endif
  let lane = lid % {{ lanes }}u;
  let n0 = ((wid.x + wid.z * {{ grid_x }}u) * {{ groups }}u + lid / {{ lanes }}u) * {{ rows }}u;
  # macro rows_of(first, n)
  # for r in range(rows)
  let chunk{{ r }} = (min(n0 + {{ r }}u, {{ n - 1 }}u){{ " - %du" % first if first }}) * {{ chunks }}u;
  # endfor
  # endmacro
{{ rows_of(0, n) if not fmt2 }}
  # for a in range(n_acc)
  var acc{{ a }} = 0.0;
  # endfor
  # if x_as == "f32"
  for (var c = lane; c < {{ chunks }}u; c += {{ lanes }}u) {
    # if m_tile == 1
    let at = m0 * {{ k // 4 }}u + c * 8u;
    # for i in range(8)
    let x{{ i }} = x[at + {{ i }}u];
    # endfor
    # endif
    # for r in range(rows)
    # for part in range(2 if act else 1)
    {
      let v = w_decode(chunk{{ r }} + {{ part * n * chunks }}u + c);
      # for m in range(m_tile)
      # set a = (r * m_tile + m) * (2 if act else 1) + part
      # if m_tile == 1
      acc{{ a }} += {% for i in range(8) %}dot(v[{{ i }}], x{{ i }}){{ " + " if not loop.last }}{% endfor %};
      # else
      let at{{ m }} = (m0 + {{ m }}u) * {{ k // 4 }}u + c * 8u;
      acc{{ a }} += {% for i in range(8) %}dot(v[{{ i }}], x[at{{ m }} + {{ i }}u]){{ " + " if not loop.last }}{% endfor %};
      # endif
      # endfor
    }
    # endfor
    # endfor
  }
  # else
  # macro fetch(w, at, ragged)
    # for u in range(unroll)
    let c{{ u }} = ({{ at }} + {{ u * lanes }}u) * {{ run }}u;
    # for r in range(rows)
    # for part in range(parts)
    let w{{ u }}_{{ r }}_{{ part }} = {{ w }}_fetch{{ "_run" if run > 1 }}(chunk{{ r }} + {{ part * n * chunks }}u + {{ "min(c%d, %du)" % (u, chunks - run) if ragged else "c%d" % u }});
    # endfor
    # endfor
    # endfor
  # endmacro
  # macro activations(m, c, ragged, name)
    {{ "var" if ragged else "let" }} {{ name }} = x_fetch(m0 + {{ m }}u, {{ "min(%s, %du)" % (c, chunks - 1) if ragged else c }});
    # if ragged
    if ({{ c }} >= {{ chunks }}u) {
      {{ name }}.d = 0.0;
      {{ name }}.total = 0.0;
      {{ name }}.sums = vec2<f32>();
    }
    # endif
  # endmacro
  # macro add(w, ragged)
    # for u in range(unroll)
    # for j in range(run)
    # set c = "c%d + %du" % (u, j) if j else "c%d" % u
    # set raw = "[%d]" % j if run > 1 else ""
{{ activations(0, c, ragged, "x%d_%d" % (u, j)) }}
    # for r in range(rows)
    # for part in range(parts)
    acc{{ r * parts + part }} = {{ w }}_onto(acc{{ r * parts + part }}, {{ w }}_ints(w{{ u }}_{{ r }}_{{ part }}{{ raw }}, chunk{{ r }} + {{ part * n * chunks }}u + {{ c }}), x{{ u }}_{{ j }});
    # endfor
    # endfor
    # endfor
    # endfor
  # endmacro
  # set span = lanes * unroll
  # set places = chunks // run
  # set whole = places // span
  # set row_at = "m0 * %du" % (k // 4)
  # set norm_name = "norm" if x_as == "norm" else ""
  # set once = quantise.batch_of(k, wg, norm_name) | int * wg >= k // 4
  # macro sums_of(w)
  // the first weights are under way before the activations are made, and what those are made from is before them
  # if own and once
{{ quantise.load("x", row_at, k, wg, subgroup, norm_name) }}
  # endif
{{ fetch(w, "lane", whole == 0) }}
  # if has_table(fmt)
  w_prepare(lid);
  # endif
  # if own
{{ quantise.row("x", row_at, k, wg, subgroup, norm_name, eps, {"name": "x_own", "plane": ints.plane(k) | int}, loaded=once) }}
  # endif
  # if own or has_table(fmt)
  workgroupBarrier();
  # endif
  {
{{ add(w, whole == 0) }}
  }
  # if whole > 1
  for (var c = lane + {{ span }}u; c < {{ whole * span }}u; c += {{ span }}u) {
{{ fetch(w, "c", false) }}
{{ add(w, false) }}
  }
  # endif
  # if whole and places % span
  {
    let c = lane + {{ whole * span }}u;
{{ fetch(w, "c", true) }}
{{ add(w, true) }}
  }
  # endif
  # endmacro
  # macro sums_of_several(w)
  # set ragged = chunks % lanes > 0
  # set planes = 3 * m_tile
  # set each = (planes + groups - 1) // groups
  # macro weights_at(c, word)
    # for r in range(rows)
    # for part in range(parts)
    {{ word }} w{{ r }}_{{ part }} = {{ w }}_fetch(chunk{{ r }} + {{ part * n * chunks }}u + {{ c }});
    # endfor
    # endfor
  # endmacro
  # macro activations_at(c, word)
    # for i in range(each)
    {{ word }} s{{ i }} = x[(m0 * 3u + {{ "min(plane + %du, %du)" % (i * groups, planes - 1) if i * groups + groups > planes else "plane + %du" % (i * groups) }}) * {{ chunks }}u + {{ c }}];
    # endfor
  # endmacro
  # if has_table(fmt)
  w_prepare(lid);
  # endif
  # if has_table(fmt) and not stage
  workgroupBarrier();
  # endif
  let first = {{ "min(lane, %du)" % (chunks - 1) if ragged else "lane" }};
  # if stage
  let plane = lid / {{ lanes }}u;
  # endif
  # if ahead
{{ weights_at("first", "var") }}
  # if stage
{{ activations_at("first", "var") }}
  # endif
  # endif
  // the number of turns is not said before the kernel runs: drivers that know it unroll the loop until it fits no cache
  let turns = {{ "min(%du, n_wg.x * %du)" % ((chunks + lanes - 1) // lanes, chunks) }};
  for (var turn = 0u; turn < turns; turn++) {
    let at = turn * {{ lanes }}u + lane;
    let c = {{ "min(at, %du)" % (chunks - 1) if ragged else "at" }};
    # if stage
    # if not ahead
{{ activations_at("c", "let") }}
    # endif
    workgroupBarrier();
    # for i in range(each)
    # if i * groups + groups > planes
    if (plane + {{ i * groups }}u < {{ planes }}u) {
    # endif
    x_staged[plane + {{ i * groups }}u][lane] = {{ "select(s%d, vec4<u32>(), at >= %du)" % (i, chunks) if ragged else "s%d" % i }};
    # if i * groups + groups > planes
    }
    # endif
    # endfor
    # endif
    # if not ahead
{{ weights_at("c", "let") }}
    # endif
    # if stage
    workgroupBarrier();
    # endif
    # for r in range(rows)
    # for part in range(parts)
    let v{{ r }}_{{ part }} = {{ w }}_ints(w{{ r }}_{{ part }}, chunk{{ r }} + {{ part * n * chunks }}u + c);
    # endfor
    # endfor
    # if ahead
    let next = min(at + {{ lanes }}u, {{ chunks - 1 }}u);
{{ weights_at("next", "") }}
    # if stage
{{ activations_at("next", "") }}
    # endif
    # endif
    # for m in range(m_tile)
    {
      # if stage
      let xm = x_staged_fetch({{ m }}u, lane);
      # else
{{ activations(m, "at", ragged, "xm") }}
      # endif
      # for r in range(rows)
      # for part in range(parts)
      # set a = (r * m_tile + m) * parts + part
      acc{{ a }} = {{ w }}_onto(acc{{ a }}, v{{ r }}_{{ part }}, xm);
      # endfor
      # endfor
    }
    # endfor
  }
  # endmacro
  # macro sums_by(w)
{{ sums_of_several(w) if several else sums_of(w) }}
  # endmacro
  # if fmt2
  if ((wid.x + wid.z * {{ grid_x }}u) * {{ groups * rows }}u < {{ n1 }}u) {
{{ rows_of(0, n1) }}
{{ sums_by("w") }}
  } else {
{{ rows_of(n1, n) }}
{{ sums_by("v") }}
  }
  # else
{{ sums_by("w") }}
  # endif
  # endif
  # if lanes == 1
  # for r in range(rows)
  # for m in range(m_tile)
  # set a = (r * m_tile + m) * (2 if act else 1)
  store(m0 + {{ m }}u, n0 + {{ r }}u, acc{{ a }}, {{ "acc%d" % (a + 1) if act else "0.0" }});
  # endfor
  # endfor
  # elif in_subgroup
  # set outputs = rows * m_tile
  # for part in range(parts)
{{ sums.spread("acc", part, parts, outputs, lanes) }}
  # endfor
  # set kept = sums.kept(outputs, lanes) | int
  # set apart = sums.apart(outputs, lanes) | int
  // lane a * apart stores the a-th output of its rows of weights, and those beyond the lanes
  if (lane % {{ apart }}u == 0u) {
    # for i in range(kept)
    {
      let a = lane / {{ apart }}u * {{ kept }}u + {{ i }}u;
      store(m0 + a % {{ m_tile }}u, n0 + a / {{ m_tile }}u, acc{{ i * parts }}, {{ "acc%d" % (i * parts + 1) if act else "0.0" }});
    }
    # endfor
  }
  # else
  # if across
{{ sums.spread("acc", 0, 1, n_acc, subgroup) }}
  # set kept = sums.kept(n_acc, subgroup) | int
  # set apart = sums.apart(n_acc, subgroup) | int
  if (lid % {{ apart }}u == 0u) {
    # for i in range(kept)
    partial[(lid % {{ subgroup }}u / {{ apart }}u * {{ kept }}u + {{ i }}u) * {{ partials }}u + lid / {{ subgroup }}u] = acc{{ i }};
    # endfor
  }
  # else
  # for a in range(n_acc)
  partial[{{ a * partials }}u + lid] = acc{{ a }};
  # endfor
  # endif
  workgroupBarrier();
  # set each = partials // groups
  for (var o = lid; o < {{ groups * rows * m_tile }}u; o += {{ wg }}u) {
    let group = o % {{ groups }}u;
    let a = o / {{ groups }}u;  // r * m_tile + m
    var first = 0.0;
    var second = 0.0;
    for (var i = 0u; i < {{ each }}u; i++) {
      first += partial[a * {{ parts * partials }}u + group * {{ each }}u + i];
      # if act
      second += partial[(a * 2u + 1u) * {{ partials }}u + group * {{ each }}u + i];
      # endif
    }
    let n = ((wid.x + wid.z * {{ grid_x }}u) * {{ groups }}u + group) * {{ rows }}u + a / {{ m_tile }}u;
    store(m0 + a % {{ m_tile }}u, n, first, second);
  }
  # endif
  # if out_as == "ints"
  workgroupBarrier();
  # set each = groups * rows
  # set quads = m_tile * each // 4
  let i = min(lid, {{ quads - 1 }}u);
  let v = vec4<f32>({% for j in range(4) %}made[i * 4u + {{ j }}u]{{ ", " if not loop.last }}{% endfor %});
{{ quantise.chunk_of_lanes() }}
  let m = m0 + i / {{ each // 4 }}u;
  let quad = (wid.x + wid.z * {{ grid_x }}u) * {{ each // 4 }}u + i % {{ each // 4 }}u;
  if (lid < {{ quads }}u && quad < {{ n // 4 }}u{{ " && m < step[%d]" % count if not sure }}) {
    let to = m * {{ 3 * n // 8 }}u;
{{ quantise.put_lane({"name": "out", "to": "to", "k": n}, "quad", "") }}
  }
  # endif
}
