// out[m, offset + n] = epilogue(sum_k w[n, k] * x[m, k]) for many rows m, on matrix units: f16 operands, f32 sums.
// A workgroup makes bn x bm outputs; `chunks` chunks at a time of its weights are decoded into workgroup memory, and its rows
// of x copied there, transposed: the drivers that were measured load a right operand well only by rows. Each subgroup
// of 32 threads keeps sn x sm sums in fragments.
// step;  x (k / 8, rows, 8) f16 and scale (n_rows,) f32 from half_rows;  weight (n, k) or (2n, k) with act;
// splits == 1: [bias (out_stride,) f32];  out (n_rows, out_stride) f32, which is added to with `residual`;
// splits > 1: out (splits, bm * grid y, bn * grid x) f32, the sums of each share of k, for matmul_sum
// With act a tile's rows of weights are 16 gate rows, their 16 up rows, the next 16 gate rows...
// constants: fmt, k, n, rows (of x at most), act, bias, residual, scale, softcap, out_stride, out_offset, per_seq, st;
// tuning: bm, bn, sm, sn, chunks, stages (2: one turn's tiles are made while those before are used), splits, turned (threads store in orders of their own)
// grid: (ceil(n / bn) or ceil(2n / bn) with act, ceil(n_rows / bm), splits)
# import "lib/epilogue.wgsl" as epilogue
# import "lib/units.wgsl" as unit
# import "quant/" ~ fmt | lower ~ ".wgsl" as own
# set count = st.N_SEQS if per_seq else st.N_ROWS
# set subgroups = (bm // sm) * (bn // sn)
# set wg = 32 * subgroups
# set w_stride = 32 * chunks + 8
# set x_stride = bm + 8
# set parts = 2 if act else 1
# set n_w = (bn * chunks + wg - 1) // wg
# set n_x = (bm * chunks * 4 + wg - 1) // wg
{{ unit.enable() }}
{{ bind("step", "u32") }}
{{ bind("x", "vec4<u32>") }}
{{ bind("x_scale", "f32") }}
{{ weight("w", fmt) }}
{{ unit.halves("w", own) }}
# if splits == 1
{{ epilogue.store(bind, st, n, act, bias, residual, scale, softcap, out_stride, out_offset, count) }}
var<workgroup> tile: array<f32, {{ 256 * parts * subgroups }}>;
# else
{{ bind("out", "f32", "read_write") }}
# endif
var<workgroup> ws: array<f16, {{ stages * bn * w_stride }}>;  // (n, k)
var<workgroup> xs: array<f16, {{ stages * 32 * chunks * x_stride }}>;  // (k, m)

@compute @workgroup_size({{ wg }})
fn main(@builtin(workgroup_id) wid: vec3<u32>, @builtin(num_workgroups) n_wg: vec3<u32>, @builtin(local_invocation_index) lid: u32) {
  let m0 = wid.y * {{ bm }}u;
  if (m0 >= step[{{ count }}]) {
    return;
  }
  let last_row = step[{{ count }}] - 1u;
  let sn0 = lid / 32u % {{ bn // sn }}u * {{ sn }}u;
  let sm0 = lid / 32u / {{ bn // sn }}u * {{ sm }}u;
  # for i in range(n_w)
  # set r = "((lid + %du) / %du)" % (i * wg, chunks)
  # if act
  let n{{ i }} = min((wid.x * {{ bn // 32 }}u + {{ r }} / 32u) * 16u + {{ r }} % 16u, {{ n - 1 }}u) + {{ r }} / 16u % 2u * {{ n }}u;
  # else
  let n{{ i }} = min(wid.x * {{ bn }}u + {{ r }}, {{ n - 1 }}u);
  # endif
  let w{{ i }} = n{{ i }} * {{ k // 32 }}u + (lid + {{ i * wg }}u) % {{ chunks }}u;
  # endfor
  {# Eight values of x at a time; neighbouring threads have neighbouring rows, so that their stores hit other banks. #}
  # for i in range(n_x)
  # set t = "(lid + %du)" % (i * wg)
  let x{{ i }} = {{ t }} / {{ bm }}u * {{ rows }}u + min(m0 + {{ t }} % {{ bm }}u, last_row);
  # endfor
  # for j in range(sn // 16)
  # for i in range(sm // 16)
  var sum{{ j }}_{{ i }} = subgroup_matrix_result<f32, 16, 16>();
  # endfor
  # endfor
  // the number of turns is not said before the kernel runs: drivers that know it unroll the loop until it fits no cache
  let share = {{ k // 32 }}u / n_wg.z;
  let begin = wid.z * share;
  # if turned
  // rows are 16 bytes times an odd number apart, so every eighth thread meets the same banks: these, and neighbours, store in
  // orders of their own
  let order = (((lid >> 3u) & 3u) << 2u) | (((lid / {{ chunks }}u) & 1u) << 1u);
  # endif
  let last = begin + share - {{ chunks }}u;
  # for i in range(n_w)
  var code{{ i }} = w_code(w{{ i }} + begin);
  # endfor
  # for i in range(n_x)
  var row{{ i }} = x[x{{ i }} + begin * {{ 4 * rows }}u];
  # endfor
  # macro put(c, w_at, x_at)
  # for i in range(n_w)
  # set t = "(lid + %du)" % (i * wg)
  {{ "if (%s < %du) " % (t, bn * chunks) if (i + 1) * wg > bn * chunks }}{
    let v = w_as_f16(code{{ i }}, w{{ i }} + {{ c }});
    let at = {{ w_at }} + {{ t }} / {{ chunks }}u * {{ w_stride }}u + {{ t }} % {{ chunks }}u * 32u;
    # if turned
    # for e in range(8)
    let p{{ e }} = select(v[{{ e }}], v[{{ e + 1 - e % 2 * 2 }}], (order & 4u) != 0u);
    # endfor
    # for e in range(8)
    # set other = e + 2 if e % 4 < 2 else e - 2
    let q{{ e }} = select(p{{ e }}, p{{ other }}, (order & 8u) != 0u);
    let z{{ e }} = select(q{{ e }}, q{{ e }}.zwxy, (order & 2u) != 0u);
    # for f in range(4)
    ws[at + ({{ 4 * e + f }}u ^ order)] = z{{ e }}[{{ f }}];
    # endfor
    # endfor
    # else
    # for e in range(8)
    # for f in range(4)
    ws[at + {{ 4 * e + f }}u] = v[{{ e }}][{{ f }}];
    # endfor
    # endfor
    # endif
  }
  # endfor
  # for i in range(n_x)
  # set t = "(lid + %du)" % (i * wg)
  {{ "if (%s < %du) " % (t, bm * chunks * 4) if (i + 1) * wg > bm * chunks * 4 }}{
    let at = {{ x_at }} + {{ t }} / {{ bm }}u * {{ 8 * x_stride }}u + {{ t }} % {{ bm }}u;
    # for e in "xyzw"
    let h{{ e }} = bitcast<vec2<f16>>(row{{ i }}.{{ e }});
    xs[at + {{ 2 * loop.index0 * x_stride }}u] = h{{ e }}.x;
    xs[at + {{ (2 * loop.index0 + 1) * x_stride }}u] = h{{ e }}.y;
    # endfor
  }
  # endfor
  # endmacro
  # macro fetch(c)
  # for i in range(n_w)
  code{{ i }} = w_code(w{{ i }} + {{ c }});
  # endfor
  # for i in range(n_x)
  row{{ i }} = x[x{{ i }} + {{ c }} * {{ 4 * rows }}u];
  # endfor
  # endmacro
  # if stages == 2
{{ put("begin", "0u", "0u") }}
  let second = min(begin + {{ chunks }}u, last);
{{ fetch("second") }}
  var turn = 0u;
  # endif
  for (var c = begin; c <= last; c += {{ chunks }}u) {
    // the next chunks are on their way while these are worked on; after the last come the last again
    # if stages == 2
    workgroupBarrier();
    let w_here = turn * {{ bn * w_stride }}u;
    let x_here = turn * {{ 32 * chunks * x_stride }}u;
    turn = 1u - turn;
    let next = min(c + {{ chunks }}u, last);
    let after = min(c + {{ 2 * chunks }}u, last);
{{ put("next", "turn * %du" % (bn * w_stride), "turn * %du" % (32 * chunks * x_stride)) }}
{{ fetch("after") }}
    # else
{{ put("c", "0u", "0u") }}
    workgroupBarrier();
    let w_here = 0u;
    let x_here = 0u;
    let next = min(c + {{ chunks }}u, last);
{{ fetch("next") }}
    # endif
    # for kk in range(0, 32 * chunks, 16)
    {
      # for i in range(sm // 16)
      let b{{ i }} = {{ unit.load("right", "xs", "x_here + %du + sm0 + %du" % (kk * x_stride, 16 * i), x_stride) }};
      # endfor
      # for j in range(sn // 16)
      {
        let a = {{ unit.load("left", "ws", "w_here + (sn0 + %du) * %du + %du" % (16 * j, w_stride, kk), w_stride) }};
        # for i in range(sm // 16)
        # set sum = "sum%d_%d" % (j, i)
        {{ sum }} = subgroupMatrixMultiplyAccumulate(a, b{{ i }}, {{ sum }});
        # endfor
      }
      # endfor
    }
    # endfor
    # if stages == 1
    workgroupBarrier();
    # endif
  }
  # for i in range(sm // 16)
  # if splits > 1
  # for j in range(sn // 16)
  {{ unit.keep("sum%d_%d" % (j, i), "out", "((wid.z * n_wg.y * %du + m0 + sm0 + %du) * n_wg.x + wid.x) * %du + sn0 + %du" % (bm, 16 * i, bn, 16 * j), "n_wg.x * %d" % bn) }}
  # endfor
  # else
  # for j in range(0, sn // 16, parts)
  # for p in range(parts)
  {{ unit.keep("sum%d_%d" % (j + p, i), "tile", "lid / 32u * %du + %du" % (256 * parts, 256 * p), 16) }}
  # endfor
  workgroupBarrier();
  for (var t = lid % 32u; t < 256u; t += 32u) {
    let m = m0 + sm0 + {{ 16 * i }}u + t / 16u;
    let factor = x_scale[min(m, last_row)];
    let at = lid / 32u * {{ 256 * parts }}u + t;
    # if act
    store(m, (wid.x * {{ bn // 32 }}u + sn0 / 32u + {{ j // 2 }}u) * 16u + t % 16u, factor * tile[at], factor * tile[at + 256u]);
    # else
    store(m, wid.x * {{ bn }}u + sn0 + {{ 16 * j }}u + t % 16u, factor * tile[at], 0.0);
    # endif
  }
  workgroupBarrier();
  # endfor
  # endif
  # endfor
}
