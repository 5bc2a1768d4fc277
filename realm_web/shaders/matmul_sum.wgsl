// out[m, offset + n] = epilogue(sum over s of part[s, m, column of n]): the second pass of a product cut along k.
// step;  part (splits, m_pad, stride) f32;  [x_scale (n_rows,) f32 with `scaled`];  [bias (out_stride,) f32];
// [kept: out (n_rows, out_stride) f32, which is added to with `residual`];  [norm: norm_weight (n,) f32]
// [made "bytes": y (n_rows) rows of lib/ints.wgsl; "halves": y and scale as in half_rows.wgsl: what became of out,
// normed with `eps` if there is a norm]
// With act columns are `group` gates, their values, the next `group` gates...
// A thread has `width` columns (1 or 4) next to each other; where a row is looked at as a whole, a workgroup's share of those.
// No load waits for another, so rows that are not there are read too. "bytes" takes subgroups of 8 or more, n whole chunks.
// constants: n, act, bias, residual, scale, softcap, out_stride, out_offset, per_seq, st;  splits, m_pad, stride, group, scaled,
// made, norm, eps, kept, rows (of y at most), width, wg, subgroup
// grid: (ceil(n / width / wg), or 1 with norm or "halves"; n_rows, 1)
# import "lib/epilogue.wgsl" as epilogue
# import "lib/halves.wgsl" as halves
# import "lib/quantise.wgsl" as quantise
# import "lib/reduce.wgsl" as lib
# set count = st.N_SEQS if per_seq else st.N_ROWS
# set t = "vec4<f32>" if width == 4 else "f32"
# set columns = n // width
# set whole = norm or made == "halves"
# set items = (columns + wg - 1) // wg if whole else 1
{{ "enable subgroups;" if subgroup and made }}
{{ bind("step", "u32") }}
{{ bind("part", t) }}
# if scaled
{{ bind("x_scale", "f32") }}
# endif
# if bias
{{ bind("bias", t) }}
# endif
# if kept
{{ bind("out", t, "read_write") }}
# endif
# if norm
{{ bind("norm_weight", t) }}
{{ lib.workgroup_reduce("sum", "add", wg, subgroup, once=true) }}
# endif
# if made == "bytes"
{{ bind("y", "u32", "read_write") }}
{{ quantise.functions() }}
# elif made == "halves"
{{ bind("y", "vec2<u32>", "read_write") }}
{{ bind("scale", "f32", "read_write") }}
{{ lib.workgroup_reduce("highest", "max", wg, subgroup, once=true) }}
# endif

@compute @workgroup_size({{ wg }})
fn main(@builtin(workgroup_id) wid: vec3<u32>, @builtin(local_invocation_index) lid: u32) {
  let m = wid.y;
  let live = m < step[{{ count }}];
  # if scaled
  let times = x_scale[m];
  # endif
  let to = m * {{ out_stride // width }}u + {{ out_offset // width }}u;
  # for i in range(items)
  let at{{ i }} = {{ "lid + %du" % (i * wg) if whole else "wid.x * %du + lid" % wg }};
  let n{{ i }} = min(at{{ i }}, {{ columns - 1 }}u);
  # set own = "n%d" % i
  let from{{ i }} = m * {{ stride // width }}u + {{ "%s / %du * %du + %s %% %du" % (own, group // width, 2 * group // width, own, group // width) if act else own }};
  # for s in range(splits)
  let a{{ i }}_{{ s }} = part[from{{ i }} + {{ s * m_pad * stride // width }}u];
  # if act
  let b{{ i }}_{{ s }} = part[from{{ i }} + {{ (s * m_pad * stride + group) // width }}u];
  # endif
  # endfor
  # if residual
  let before{{ i }} = out[to + n{{ i }}];
  # endif
  # if norm
  let weight{{ i }} = norm_weight[n{{ i }}];
  # endif
  # endfor
  # for i in range(items)
  var v{{ i }}: {{ t }};
  {
    let n = n{{ i }};
    var first = {% for s in range(splits) %}a{{ i }}_{{ s }}{{ " + " if not loop.last }}{% endfor %};
    # if act
    var second = {% for s in range(splits) %}b{{ i }}_{{ s }}{{ " + " if not loop.last }}{% endfor %};
    # endif
    # if scaled
    first *= times;
    {{ "second *= times;" if act }}
    # endif
{{ epilogue.value(act, bias, scale, softcap, out_offset, width == 4) }}
    v{{ i }} = {{ "before%d + " % i if residual }}v;
  }
  # if kept
  if (live && at{{ i }} < {{ columns }}u) {
    out[to + at{{ i }}] = v{{ i }};
  }
  # endif
  # endfor
  # if norm
  let squares = {% for i in range(items) %}select(0.0, dot(v{{ i }}, v{{ i }}), at{{ i }} < {{ columns }}u){{ " + " if not loop.last }}{% endfor %};
  let factor = inverseSqrt(sum(squares, lid) / {{ n }}.0 + {{ "%.9g" % eps }});
  # for i in range(items)
  v{{ i }} *= weight{{ i }};
  # endfor
  # elif made == "halves"
  let factor = 1.0;
  # endif
  # if made == "bytes"
  let to_row = m * {{ 3 * n // 8 }}u;
  # for i in range(items)
  {
    let v = v{{ i }};
{{ quantise.chunk_of_lanes() }}
    if (live && at{{ i }} < {{ columns }}u) {
{{ quantise.put_lane({"name": "y", "to": "to_row", "k": n}, "at%d" % i, " * factor" if norm else "") }}
    }
  }
  # endfor
  # elif made == "halves"
{{ halves.store(items, columns, rows) }}
  # endif
}
