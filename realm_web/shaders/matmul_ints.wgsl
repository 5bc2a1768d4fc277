// out[m, offset + n] = epilogue(sum_k w[n, k] * x[m, k]) for many rows m: integer weights and activations of 8 bits, four
// products at a time. A workgroup makes bm x bn outputs; `chunks` chunks at a time, weights and activations are put into
// workgroup memory as bytes; each thread keeps tm x tn sums, and goes from integer to float once a chunk.
// step;  x of quantised rows, as lib/ints.wgsl has them;  weight (n, k) or (2n, k) with act;
// splits == 1: [bias (out_stride,) f32];  out (n_rows, out_stride) f32, which is added to with `residual`;
// splits > 1: out (splits, bm * grid y, bn * grid x) f32, the sums of each share of k, for matmul_sum
// With act a tile's columns are `across` gate rows, their up rows, the next `across` gate rows... (across = bn / tn)
// constants: fmt, k, n, act, bias, residual, scale, softcap, out_stride, out_offset, per_seq, st;
// tuning: bm, bn, tm, tn, chunks, splits
// grid: (ceil(n / bn) or ceil(2n / bn) with act, ceil(n_rows / bm), splits)
# import "lib/epilogue.wgsl" as epilogue
# import "lib/ints.wgsl" as int
# import "quant/" ~ fmt | lower ~ ".wgsl" as own
# set count = st.N_SEQS if per_seq else st.N_ROWS
# set across = bn // tn
# set down = bm // tm
# set wg = across * down
# set stride = 2 * chunks + 1
# set share = k // 32 // splits
# set n_w = (bn * chunks + wg - 1) // wg
# set n_x = (bm * chunks + wg - 1) // wg
# set pair = "vec2<f32>" if own.halves else "f32"
{{ bind("step", "u32") }}
{{ bind("x", "vec4<u32>") }}
{{ weight_ints("w", fmt) }}
{{ int.activations("x", k) }}
# if splits == 1
{{ epilogue.store(bind, st, n, act, bias, residual, scale, softcap, out_stride, out_offset, count) }}
# else
{{ bind("out", "f32", "read_write") }}
# endif
var<workgroup> xs: array<vec4<u32>, {{ bm * stride }}>;  // (m, chunk, half): an odd stride spreads rows over the banks
var<workgroup> ws: array<vec4<u32>, {{ bn * stride }}>;  // (n, chunk, half)
var<workgroup> xd: array<f32, {{ bm * chunks }}>;  // (chunk, m)
var<workgroup> wd: array<{{ pair }}, {{ bn * chunks }}>;  // (chunk, n)
# if own.minimum
# set low = "vec2<f32>" if own.minimum == "halves" else "f32"
var<workgroup> xm: array<{{ low }}, {{ bm * chunks }}>;
var<workgroup> wm: array<{{ low }}, {{ bn * chunks }}>;
# endif

{# Bytes of a code less the format's offset: the top bit keeps the four from borrowing of each other. #}
fn signed_bytes(v: vec4<u32>) -> vec4<u32> {
  return {{ "((v | vec4<u32>(0x80808080u)) - vec4<u32>(%uu)) ^ vec4<u32>(0x80808080u)" | replace("%u", own.offset * 0x01010101) if own.offset else "v" }};
}

@compute @workgroup_size({{ wg }})
fn main(@builtin(workgroup_id) wid: vec3<u32>, @builtin(num_workgroups) n_wg: vec3<u32>, @builtin(local_invocation_index) lid: u32) {
  let m0 = wid.y * {{ bm }}u;
  if (m0 >= step[{{ count }}]) {
    return;
  }
  let last_row = step[{{ count }}] - 1u;
  // 32 neighbouring threads make a block of 8 x 4 sums, so that they read few different rows
  # if across % 8 == 0 and down % 4 == 0
  let tx = lid % 8u + lid / 32u % {{ across // 8 }}u * 8u;
  let ty = lid / 8u % 4u + lid / {{ 4 * across }}u * 4u;
  # else
  let tx = lid % {{ across }}u;
  let ty = lid / {{ across }}u;
  # endif
  # for i in range(n_w)
  let wr{{ i }} = min((lid + {{ i * wg }}u) / {{ chunks }}u, {{ bn - 1 }}u);
  # if act
  let wn{{ i }} = (min(wid.x * {{ bn // 2 }}u + wr{{ i }} / {{ 2 * across }}u * {{ across }}u + wr{{ i }} % {{ across }}u, {{ n - 1 }}u)
    + wr{{ i }} / {{ across }}u % 2u * {{ n }}u) * {{ k // 32 }}u + (lid + {{ i * wg }}u) % {{ chunks }}u;
  # else
  let wn{{ i }} = min(wid.x * {{ bn }}u + wr{{ i }}, {{ n - 1 }}u) * {{ k // 32 }}u + (lid + {{ i * wg }}u) % {{ chunks }}u;
  # endif
  # endfor
  # for i in range(tm)
  # for j in range(tn)
  var sum{{ i }}_{{ j }} = 0.0;
  # endfor
  # endfor
  let begin = wid.z * {{ share }}u;
  # for i in range(n_w)
  var raw{{ i }} = w_fetch(wn{{ i }} + begin);
  # endfor
  # for i in range(n_x)
  # set t = "(lid + %du)" % (i * wg)
  var act{{ i }} = x_fetch(min(m0 + {{ t }} / {{ chunks }}u, last_row), begin + {{ t }} % {{ chunks }}u);
  # endfor
  for (var c = begin; c < begin + {{ share }}u; c += {{ chunks }}u) {
    # for i in range(n_w)
    # set t = "(lid + %du)" % (i * wg)
    {{ "if (%s < %du) " % (t, bn * chunks) if (i + 1) * wg > bn * chunks }}{
      let v = w_ints(raw{{ i }}, wn{{ i }} + c);
      let at = {{ t }} / {{ chunks }}u * {{ stride }}u + {{ t }} % {{ chunks }}u * 2u;
      let own_at = {{ t }} % {{ chunks }}u * {{ bn }}u + {{ t }} / {{ chunks }}u;
      ws[at] = signed_bytes(v.a);
      ws[at + 1u] = signed_bytes(v.b);
      wd[own_at] = v.s{{ "" if own.halves else ".x" }};
      # if own.minimum
      wm[own_at] = v.m{{ "" if own.minimum == "halves" else ".x" }};
      # endif
    }
    # endfor
    # for i in range(n_x)
    # set t = "(lid + %du)" % (i * wg)
    {{ "if (%s < %du) " % (t, bm * chunks) if (i + 1) * wg > bm * chunks }}{
      let at = {{ t }} / {{ chunks }}u * {{ stride }}u + {{ t }} % {{ chunks }}u * 2u;
      let own_at = {{ t }} % {{ chunks }}u * {{ bm }}u + {{ t }} / {{ chunks }}u;
      xs[at] = act{{ i }}.a;
      xs[at + 1u] = act{{ i }}.b;
      xd[own_at] = act{{ i }}.d;
      # if own.minimum == "halves"
      xm[own_at] = act{{ i }}.d * vec2<f32>(act{{ i }}.sums);
      # elif own.minimum
      xm[own_at] = act{{ i }}.d * f32(act{{ i }}.sums.x + act{{ i }}.sums.y);
      # endif
    }
    # endfor
    workgroupBarrier();
    // the next chunks are on their way while these are worked on; after the last come the last again
    let next = min(c + {{ chunks }}u, begin + {{ share - chunks }}u);
    # for i in range(n_w)
    raw{{ i }} = w_fetch(wn{{ i }} + next);
    # endfor
    # for i in range(n_x)
    # set t = "(lid + %du)" % (i * wg)
    act{{ i }} = x_fetch(min(m0 + {{ t }} / {{ chunks }}u, last_row), next + {{ t }} % {{ chunks }}u);
    # endfor
    for (var cc = 0u; cc < {{ chunks }}u; cc++) {
      # for j in range(tn)
      let wa{{ j }} = ws[(tx + {{ j * across }}u) * {{ stride }}u + cc * 2u];
      let wb{{ j }} = ws[(tx + {{ j * across }}u) * {{ stride }}u + cc * 2u + 1u];
      let dw{{ j }} = wd[cc * {{ bn }}u + tx + {{ j * across }}u];
      # if own.minimum
      let mw{{ j }} = wm[cc * {{ bn }}u + tx + {{ j * across }}u];
      # endif
      # endfor
      # for i in range(tm)
      {
        let xa = xs[(ty + {{ i * down }}u) * {{ stride }}u + cc * 2u];
        let xb = xs[(ty + {{ i * down }}u) * {{ stride }}u + cc * 2u + 1u];
        let d = xd[cc * {{ bm }}u + ty + {{ i * down }}u];
        # if own.minimum
        let m = xm[cc * {{ bm }}u + ty + {{ i * down }}u];
        # endif
        # for j in range(tn)
        # if own.halves
        sum{{ i }}_{{ j }} += d * (dw{{ j }}.x * f32(dot16(wa{{ j }}, xa)) + dw{{ j }}.y * f32(dot16(wb{{ j }}, xb)));
        # else
        sum{{ i }}_{{ j }} += d * dw{{ j }} * f32(dot16(wa{{ j }}, xa) + dot16(wb{{ j }}, xb));
        # endif
        # if own.minimum == "halves"
        sum{{ i }}_{{ j }} -= dot(mw{{ j }}, m);
        # elif own.minimum
        sum{{ i }}_{{ j }} -= mw{{ j }} * m;
        # endif
        # endfor
      }
      # endfor
    }
    workgroupBarrier();
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
