// out[m, offset + n] = epilogue(sum_k w[n, k] * x[m, k]) for many rows m, in tiles of bm x bn outputs: `chunks` chunks of
// 32 at a time of its weights and activations are put into workgroup memory; each thread keeps tm x tn sums.
// x_as "ints": weights and activations are bytes there, multiplied four at a time; sums become floats once a chunk.
// x_as "f32": weights are decoded on their way, all is float32.
// step;  x (n_rows, k) f32, or quantised rows as lib/ints.wgsl has them;  weight (n, k) or (2n, k) with act;
// splits == 1: [bias (out_stride,) f32];  out (n_rows, out_stride) f32, which is added to with `residual`;
// splits > 1: out (splits, bm * grid y, bn * grid x) f32, the sums of each share of k, for matmul_sum
// With act a tile's columns are `across` gate rows, their up rows, the next `across` gate rows... (across = bn / tn)
// constants: fmt, k, n, act, bias, residual, scale, softcap, out_stride, out_offset, per_seq, st;
// tuning: x_as, bm, bn, tm, tn, chunks, stages (2: one turn's tiles are made while those before are used), splits
// grid: (ceil(n / bn) or ceil(2n / bn) with act, ceil(rows / bm), splits); tiles behind the last of n_rows end at once, and of
// one that holds no more than half of bm rows only that half is multiplied
# import "lib/epilogue.wgsl" as epilogue
# import "lib/ints.wgsl" as int
# import "quant/" ~ fmt | lower ~ ".wgsl" as own
# set ints = x_as == "ints"
# set count = st.N_SEQS if per_seq else st.N_ROWS
# set across = bn // tn
# set down = bm // tm
# set wg = across * down
# set n_w = (bn * chunks + wg - 1) // wg
# set x_items = chunks if ints else 8 * chunks
# set n_x = (bm * x_items + wg - 1) // wg
# set ahead = own.ints is defined
# set parts = 2 if tm >= 8 else 1
{{ bind("step", "u32") }}
{{ bind("x", "vec4<u32>" if ints else "vec4<f32>") }}
{{ weight_ints("w", fmt) if ints else weight("w", fmt) }}
{{ int.activations("x", k) if ints }}
# if splits == 1
{{ epilogue.store(bind, st, n, act, bias, residual, scale, softcap, out_stride, out_offset, count) }}
# else
{{ bind("out", "f32", "read_write") }}
# endif
# if ints
{# An odd stride spreads the rows over the banks. #}
# set stride = 2 * chunks + 1
# set low = {"halves": "vec2<f32>", "chunk": "f32"}[own.minimum] if own.minimum else ""
var<workgroup> xs: array<vec4<u32>, {{ stages * bm * stride }}>;  // (m, chunk, half)
var<workgroup> ws: array<vec4<u32>, {{ stages * bn * stride }}>;  // (n, chunk, half)
var<workgroup> xd: array<f32, {{ stages * bm * chunks }}>;  // (chunk, m)
var<workgroup> wd: array<{{ "vec2<f32>" if own.halves else "f32" }}, {{ stages * bn * chunks }}>;  // (chunk, n)
# if low
var<workgroup> xm: array<{{ low }}, {{ stages * bm * chunks }}>;
var<workgroup> wm: array<{{ low }}, {{ stages * bn * chunks }}>;
# endif

fn signed_bytes(v: vec4<u32>) -> vec4<u32> {
  # if own.offset
  // the top bit keeps the bytes from borrowing of each other
  return ((v | vec4<u32>(0x80808080u)) - vec4<u32>({{ own.offset * 0x01010101 }}u)) ^ vec4<u32>(0x80808080u);
  # else
  return v;
  # endif
}
# else
var<workgroup> xs: array<vec4<f32>, {{ stages * 8 * bm * chunks }}>;  // (m, k), as `place` has it
var<workgroup> ws: array<vec4<f32>, {{ stages * 8 * bn * chunks }}>;  // (n, k)

{# Neighbouring rows keep the same k in different banks. #}
fn place(row: u32, k4: u32) -> u32 {
  return row * {{ 8 * chunks }}u + (k4 ^ (row & 7u));
}
# endif

@compute @workgroup_size({{ wg }})
fn main(@builtin(workgroup_id) wid: vec3<u32>, @builtin(num_workgroups) n_wg: vec3<u32>, @builtin(local_invocation_index) lid: u32) {
  let m0 = wid.y * {{ bm }}u;
  if (m0 >= step[{{ count }}]) {
    return;
  }
  let last_row = step[{{ count }}] - 1u;
  # if parts == 2
  let both = last_row - m0 >= {{ bm // 2 }}u;
  # endif
  // 32 neighbouring threads make a block of 8 x 4 threads' sums, so that they read few different rows
  # if across % 8 == 0 and down % 4 == 0
  let tx = lid % 8u + lid / 32u % {{ across // 8 }}u * 8u;
  let ty = lid / 8u % 4u + lid / {{ 4 * across }}u * 4u;
  # else
  let tx = lid % {{ across }}u;
  let ty = lid / {{ across }}u;
  # endif
  # for i in range(n_w)
  # set t = "(lid + %du)" % (i * wg)
  let r{{ i }} = min({{ t }} / {{ chunks }}u, {{ bn - 1 }}u);
  # if act
  let n{{ i }} = min(wid.x * {{ bn // 2 }}u + r{{ i }} / {{ 2 * across }}u * {{ across }}u + r{{ i }} % {{ across }}u, {{ n - 1 }}u) + r{{ i }} / {{ across }}u % 2u * {{ n }}u;
  # else
  let n{{ i }} = min(wid.x * {{ bn }}u + r{{ i }}, {{ n - 1 }}u);
  # endif
  let w{{ i }} = n{{ i }} * {{ k // 32 }}u + {{ t }} % {{ chunks }}u;
  # endfor
  # for i in range(tm)
  # for j in range(tn)
  var sum{{ i }}_{{ j }} = 0.0;
  # endfor
  # endfor
  // the number of turns is not said before the kernel runs: drivers that know it unroll the loop until it fits no cache
  let share = {{ k // 32 }}u / n_wg.z;
  let begin = wid.z * share;
  let last = begin + share - {{ chunks }}u;
  # macro fetch(c, word)
  # if ahead
  # for i in range(n_w)
  {{ word }} raw{{ i }} = w_fetch(w{{ i }} + {{ c }});
  # endfor
  # endif
  # for i in range(n_x)
  # set t = "(lid + %du)" % (i * wg)
  # if ints
  {{ word }} x{{ i }} = x_fetch(min(m0 + {{ t }} / {{ chunks }}u, last_row), {{ c }} + {{ t }} % {{ chunks }}u);
  # else
  {{ word }} x{{ i }} = x[min(m0 + {{ t }} / {{ x_items }}u, last_row) * {{ k // 4 }}u + {{ c }} * 8u + {{ t }} % {{ x_items }}u];
  # endif
  # endfor
  # endmacro
  {# What was fetched, of chunk c on, into half `to` (0u or 1u) of workgroup memory. #}
  # macro put(c, to)
  # for i in range(n_w)
  # set t = "(lid + %du)" % (i * wg)
  {{ "if (%s < %du) " % (t, bn * chunks) if (i + 1) * wg > bn * chunks }}{
    let row = {{ t }} / {{ chunks }}u + {{ to }} * {{ bn }}u;
    let cc = {{ t }} % {{ chunks }}u;
    # if ints
    let v = w_ints(raw{{ i }}, w{{ i }} + {{ c }});
    ws[row * {{ stride }}u + cc * 2u] = signed_bytes(v.a);
    ws[row * {{ stride }}u + cc * 2u + 1u] = signed_bytes(v.b);
    wd[cc * {{ stages * bn }}u + row] = v.s{{ "" if own.halves else ".x" }};
    # if low
    wm[cc * {{ stages * bn }}u + row] = v.m{{ "" if own.minimum == "halves" else ".x" }};
    # endif
    # else
    let v = {{ "w_floats(w_ints(raw%d, w%d + %s))" % (i, i, c) if ahead else "w_decode(w%d + %s)" % (i, c) }};
    # for e in range(8)
    ws[place(row, cc * 8u + {{ e }}u)] = v[{{ e }}];
    # endfor
    # endif
  }
  # endfor
  # for i in range(n_x)
  # set t = "(lid + %du)" % (i * wg)
  {{ "if (%s < %du) " % (t, bm * x_items) if (i + 1) * wg > bm * x_items }}{
    let row = {{ t }} / {{ x_items }}u + {{ to }} * {{ bm }}u;
    let cc = {{ t }} % {{ x_items }}u;
    # if ints
    xs[row * {{ stride }}u + cc * 2u] = x{{ i }}.a;
    xs[row * {{ stride }}u + cc * 2u + 1u] = x{{ i }}.b;
    xd[cc * {{ stages * bm }}u + row] = x{{ i }}.d;
    # if own.minimum == "halves"
    xm[cc * {{ stages * bm }}u + row] = x{{ i }}.sums;
    # elif low
    xm[cc * {{ stages * bm }}u + row] = x{{ i }}.total;
    # endif
    # else
    xs[place(row, cc)] = x{{ i }};
    # endif
  }
  # endfor
  # endmacro
{{ fetch("begin", "var") }}
  # if stages == 2
{{ put("begin", "0u") }}
  let second = min(begin + {{ chunks }}u, last);
{{ fetch("second", "") }}
  # endif
  for (var c = begin; c <= last; c += {{ chunks }}u) {
    // the next chunks are on their way while these are worked on; after the last come the last again
    let next = min(c + {{ chunks }}u, last);
    # if stages == 2
    workgroupBarrier();
    let half = ((c - begin) / {{ chunks }}u) & 1u;
    let after = min(c + {{ 2 * chunks }}u, last);
{{ put("next", "(1u - half)") }}
{{ fetch("after", "") }}
    # else
{{ put("c", "0u") }}
    workgroupBarrier();
    let half = 0u;
{{ fetch("next", "") }}
    # endif
    let own_tx = tx + half * {{ bn }}u;
    let own_ty = ty + half * {{ bm }}u;
    # if ints
    for (var cc = 0u; cc < {{ chunks }}u; cc++) {
      # for j in range(tn)
      let a{{ j }} = ws[(own_tx + {{ j * across }}u) * {{ stride }}u + cc * 2u];
      let b{{ j }} = ws[(own_tx + {{ j * across }}u) * {{ stride }}u + cc * 2u + 1u];
      let d{{ j }} = wd[cc * {{ stages * bn }}u + own_tx + {{ j * across }}u];
      # if low
      let low{{ j }} = wm[cc * {{ stages * bn }}u + own_tx + {{ j * across }}u];
      # endif
      # endfor
      # for part in range(parts)
      {{ "if (both) " if part }}{
      # for i in range(part * tm // parts, (part + 1) * tm // parts)
      {
        let a = xs[(own_ty + {{ i * down }}u) * {{ stride }}u + cc * 2u];
        let b = xs[(own_ty + {{ i * down }}u) * {{ stride }}u + cc * 2u + 1u];
        let d = xd[cc * {{ stages * bm }}u + own_ty + {{ i * down }}u];
        # if low
        let m = xm[cc * {{ stages * bm }}u + own_ty + {{ i * down }}u];
        # endif
        # for j in range(tn)
        # if own.halves
        sum{{ i }}_{{ j }} += d * (d{{ j }}.x * f32(dot16(a{{ j }}, a)) + d{{ j }}.y * f32(dot16(b{{ j }}, b)));
        # else
        sum{{ i }}_{{ j }} += d * d{{ j }} * f32(dot16(a{{ j }}, a) + dot16(b{{ j }}, b));
        # endif
        # if own.minimum == "halves"
        sum{{ i }}_{{ j }} -= dot(low{{ j }}, m);
        # elif low
        sum{{ i }}_{{ j }} -= low{{ j }} * m;
        # endif
        # endfor
      }
      # endfor
      }
      # endfor
    }
    # else
    for (var k4 = 0u; k4 < {{ 8 * chunks }}u; k4++) {
      # for j in range(tn)
      let w{{ j }} = ws[place(own_tx + {{ j * across }}u, k4)];
      # endfor
      # for part in range(parts)
      {{ "if (both) " if part }}{
      # for i in range(part * tm // parts, (part + 1) * tm // parts)
      {
        let v = xs[place(own_ty + {{ i * down }}u, k4)];
        # for j in range(tn)
        sum{{ i }}_{{ j }} += dot(w{{ j }}, v);
        # endfor
      }
      # endfor
      }
      # endfor
    }
    # endif
    # if stages == 1
    workgroupBarrier();
    # endif
  }
  # for i in range(tm)
  # if splits > 1
  # for j in range(tn)
  out[((wid.z * n_wg.y + wid.y) * {{ bm }}u + ty + {{ i * down }}u) * n_wg.x * {{ bn }}u + wid.x * {{ bn }}u + tx + {{ j * across }}u] = sum{{ i }}_{{ j }};
  # endfor
  # elif act
  # for j in range(0, tn, 2)
  store(m0 + ty + {{ i * down }}u, wid.x * {{ bn // 2 }}u + tx + {{ j // 2 * across }}u, sum{{ i }}_{{ j }}, sum{{ i }}_{{ j + 1 }});
  # endfor
  # else
  # for j in range(tn)
  store(m0 + ty + {{ i * down }}u, wid.x * {{ bn }}u + tx + {{ j * across }}u, sum{{ i }}_{{ j }}, 0.0);
  # endfor
  # endif
  # endfor
}
