// out[m, offset + n] = epilogue(sum over s of part[s, m, column of n]): the second pass of a product cut along k.
// step;  part (splits, m_pad, stride) f32;  [x_scale (n_rows,) f32 with `scaled`];
// [bias (out_stride,) f32];  out (n_rows, out_stride) f32, which is added to with `residual`;
// [norm (n,) f32, rows (n_rows) rows of lib/ints.wgsl: what became of out, normed with `eps`, in 8 bits]
// With `ints` out is rows of lib/ints.wgsl itself. Both take subgroups of 8 or more and n a multiple of 32.
// With act columns are `group` gates, their values, the next `group` gates...
// A thread has `width` columns (1 or 4) next to each other; where there is a norm, as many such as a row has for a workgroup.
// No load waits for another, so rows that are not there are read too.
// constants: n, act, bias, residual, scale, softcap, out_stride, out_offset, per_seq, st;  splits, m_pad, stride, group, scaled,
// ints, norm, eps, width, wg, subgroup
// grid: (ceil(n / width / wg), or 1 with norm; n_rows, 1)
# import "lib/epilogue.wgsl" as epilogue
# import "lib/quantise.wgsl" as quantise
# import "lib/reduce.wgsl" as lib
# set count = st.N_SEQS if per_seq else st.N_ROWS
# set t = "vec4<f32>" if width == 4 else "f32"
# set columns = n // width
# set items = (columns + wg - 1) // wg if norm else 1
{{ "enable subgroups;" if subgroup and (ints or norm) }}
{{ bind("step", "u32") }}
{{ bind("part", t) }}
# if scaled
{{ bind("x_scale", "f32") }}
# endif
# if bias
{{ bind("bias", t) }}
# endif
{{ bind("out", "u32" if ints else t, "read_write") }}
# if norm
{{ bind("norm_weight", t) }}
{{ bind("rows", "u32", "read_write") }}
{{ lib.workgroup_reduce("sum", "add", wg, subgroup, once=true) }}
# endif
{{ quantise.functions() if ints or norm }}

@compute @workgroup_size({{ wg }})
fn main(@builtin(workgroup_id) wid: vec3<u32>, @builtin(local_invocation_index) lid: u32) {
  let m = wid.y;
  let live = m < step[{{ count }}];
  # if scaled
  let times = x_scale[m];
  # endif
  let to = m * {{ out_stride // width }}u + {{ out_offset // width }}u;
  # for i in range(items)
  let at{{ i }} = {{ "lid + %du" % (i * wg) if norm else "wid.x * %du + lid" % wg }};
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
  var y{{ i }}: {{ t }};
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
    y{{ i }} = {{ "before%d + " % i if residual }}v;
  }
  # endfor
  # if ints
  let to_row = m * {{ 3 * n // 8 }}u;
  let v = y0;
{{ quantise.chunk_of_lanes() }}
  if (live && at0 < {{ columns }}u) {
{{ quantise.put_lane({"name": "out", "to": "to_row", "k": n}, "at0", "") }}
  }
  # else
  # for i in range(items)
  if (live && at{{ i }} < {{ columns }}u) {
    out[to + at{{ i }}] = y{{ i }};
  }
  # endfor
  # endif
  # if norm
  let to_row = m * {{ 3 * n // 8 }}u;
  let squares = {% for i in range(items) %}select(0.0, dot(y{{ i }}, y{{ i }}), at{{ i }} < {{ columns }}u){{ " + " if not loop.last }}{% endfor %};
  let factor = inverseSqrt(sum(squares, lid) / {{ n }}.0 + {{ "%.9g" % eps }});
  # for i in range(items)
  {
    let v = y{{ i }} * weight{{ i }};
{{ quantise.chunk_of_lanes() }}
    if (live && at{{ i }} < {{ columns }}u) {
{{ quantise.put_lane({"name": "rows", "to": "to_row", "k": n}, "at%d" % i, " * factor") }}
    }
  }
  # endfor
  # endif
}
