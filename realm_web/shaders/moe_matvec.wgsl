// Matrix-vector products with the experts that `moe_route` chose for each token; no other expert is read.
// With x of a row per token: out[t * n_used + j, offset + n] = act(w[e, n] . x[t] + bias[e, n]), e = routes[t, j].expert
// With `weighted`: out[t, n] (+)= scale * sum_j routes[t, j].weight * (w[e, n] . x[t * n_used + j] + bias[e, n])
// step;  x (n_rows, k) or weighted (n_rows * n_used, k) f32, or with x_as "ints" such rows of lib/ints.wgsl;  routes (n_rows, n_used) vec2<u32>: expert, bits of its weight
// weight (n_here * per, k), per = n or with act 2n: an expert's gate rows, then its up rows; of the n_here experts from
// first_expert on, the others being left out;  [bias (n_experts, per) f32];  out (., out_stride) f32, added to with `residual`
// constants: fmt, k, n, act, bias, weighted, residual, scale, n_used, n_experts, first_expert, n_here, out_stride, out_offset,
// x_as ("f32", "ints"), st;
// tuning: lanes threads per weight row (1, the subgroup size or a multiple; without subgroups any divisor of wg); rows of
// weights per lane group; wg threads; subgroup size or 0
// grid: (ceil(n / (wg / lanes * rows)) folded at grid_x, n_rows * (1 if weighted else n_used), fold)
# import "lib/act.wgsl" as acts
# import "lib/ints.wgsl" as ints
# import "lib/lanes.wgsl" as sums
# set groups = wg // lanes
# set halves = 2 if act else 1
# set n_acc = rows * halves
# set chunks = k // 32
# set sharded = n_here < n_experts
{{ "enable subgroups;" if subgroup and lanes > 1 }}
{{ bind("step", "u32") }}
{{ bind("x", "vec4<u32>" if x_as == "ints" else "vec4<f32>") }}
{{ bind("routes", "vec2<u32>") }}
{{ weight_ints("w", fmt, wg) if x_as == "ints" else weight("w", fmt) }}
{{ ints.activations("x", k) if x_as == "ints" }}
# if bias
{{ bind("bias", "f32") }}
# endif
{{ bind("out", "f32", "read_write") }}

{{ sums.shared(n_acc, lanes, wg, subgroup) }}

fn expert_of(route: vec2<u32>) -> u32 {
  return min(route.x, {{ n_experts - 1 }}u);
}

# if sharded
fn is_here(expert: u32) -> bool {
  return expert >= {{ first_expert }}u && expert < {{ first_expert + n_here }}u;
}
# endif

@compute @workgroup_size({{ wg }})
fn main(@builtin(workgroup_id) wid: vec3<u32>, @builtin(local_invocation_index) lid: u32) {
  if (wid.y >= step[{{ st.N_ROWS }}]{{ "" if weighted else " * %du" % n_used }}) {
    return;
  }
  # if not weighted
  let expert = expert_of(routes[wid.y]);
  # if sharded
  if (!is_here(expert)) {
    return;
  }
  # endif
  # endif
  # if x_as == "ints" and has_table(fmt)
  w_prepare(lid);
  workgroupBarrier();
  # endif
  let lane = lid % {{ lanes }}u;
  let n0 = ((wid.x + wid.z * {{ grid_x }}u) * {{ groups }}u + lid / {{ lanes }}u) * {{ rows }}u;
  # for r in range(rows)
  let chunk{{ r }} = min(n0 + {{ r }}u, {{ n - 1 }}u) * {{ chunks }}u;
  # endfor
  # for a in range(n_acc)
  var acc{{ a }} = 0.0;
  # endfor
  # if weighted
  for (var i = lane; i < {{ n_used * chunks }}u; i += {{ lanes }}u) {
    let route = routes[wid.y * {{ n_used }}u + i / {{ chunks }}u];
    let expert = expert_of(route);
    # if sharded
    if (!is_here(expert)) {
      continue;
    }
    # endif
    let share = bitcast<f32>(route.y);
    let c = i % {{ chunks }}u;
    let row = wid.y * {{ n_used }}u + i / {{ chunks }}u;
  # else
  for (var c = lane; c < {{ chunks }}u; c += {{ lanes }}u) {
    let row = wid.y / {{ n_used }}u;
  # endif
    let base = (expert - {{ first_expert }}u) * {{ halves * n * chunks }}u + c;
    # if x_as == "ints"
    # for r in range(rows)
    # for half in range(halves)
    let w{{ r }}_{{ half }} = w_fetch(base + chunk{{ r }} + {{ half * n * chunks }}u);
    # endfor
    # endfor
    let a = x_fetch(row, c);
    # else
    let at = row * {{ k // 4 }}u + c * 8u;
    # for i in range(8)
    let x{{ i }} = x[at + {{ i }}u];
    # endfor
    # endif
    # for r in range(rows)
    # for half in range(halves)
    {
      # if x_as == "ints"
      let term = product(w_ints(w{{ r }}_{{ half }}, base + chunk{{ r }} + {{ half * n * chunks }}u), a);
      # else
      let v = w_decode(base + chunk{{ r }} + {{ half * n * chunks }}u);
      let term = {% for i in range(8) %}dot(v[{{ i }}], x{{ i }}){{ " + " if not loop.last }}{% endfor %};
      # endif
      acc{{ r * halves + half }} += {{ "share * " if weighted }}term;
    }
    # endfor
    # endfor
  }
  {{ sums.add(n_acc, lanes, wg, subgroup) }}
  if (lane != 0u) {
    return;
  }
  # for r in range(rows)
  if (n0 + {{ r }}u < {{ n }}u) {
    let n = n0 + {{ r }}u;
    var v = acc{{ r * halves }};
    # if weighted
    # if bias
    for (var j = 0u; j < {{ n_used }}u; j++) {
      let route = routes[wid.y * {{ n_used }}u + j];
      let expert = expert_of(route);
      # if sharded
      if (!is_here(expert)) {
        continue;
      }
      # endif
      v += bitcast<f32>(route.y) * bias[expert * {{ n }}u + n];
    }
    # endif
    # else
    # if bias
    v += bias[expert * {{ halves * n }}u + n];
    # endif
    # if act
    let up = acc{{ r * halves + 1 }}{{ " + bias[expert * %du + %du + n]" % (2 * n, n) if bias }};
    v = {{ acts.gated(act, "v", "up") }};
    # endif
    # endif
    let to = wid.y * {{ out_stride }}u + {{ out_offset }}u + n;
    out[to] = {{ "out[to] + " if residual }}v{{ " * %.9g" % scale if scale != 1.0 }};
  }
  # endfor
}
