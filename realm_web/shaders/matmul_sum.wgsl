// out[m, offset + n] = epilogue(sum over s of part[s, m, column of n]): the second pass of a product cut along k.
// step;  part (splits, m_pad, stride) f32;  [x_scale (n_rows,) f32 with `scaled`];
// [bias (out_stride,) f32];  out (n_rows, out_stride) f32, which is added to with `residual`
// With act columns are `group` gates, their values, the next `group` gates...
// constants: n, act, bias, residual, scale, softcap, out_stride, out_offset, per_seq, st;  splits, m_pad, stride, group, scaled
// grid: (ceil(n / 64), n_rows, 1)
# import "lib/epilogue.wgsl" as epilogue
# set count = st.N_SEQS if per_seq else st.N_ROWS
{{ bind("step", "u32") }}
{{ bind("part", "f32") }}
# if scaled
{{ bind("x_scale", "f32") }}
# endif
{{ epilogue.store(bind, st, n, act, bias, residual, scale, softcap, out_stride, out_offset, count) }}

@compute @workgroup_size(64)
fn main(@builtin(workgroup_id) wid: vec3<u32>, @builtin(local_invocation_index) lid: u32) {
  let n = wid.x * 64u + lid;
  let m = wid.y;
  if (n >= {{ n }}u || m >= step[{{ count }}]) {
    return;
  }
  let at = m * {{ stride }}u + {{ "n / %du * %du + n %% %du" % (group, 2 * group, group) if act else "n" }};
  var first = 0.0;
  var second = 0.0;
  # for s in range(splits)
  first += part[at + {{ s * m_pad * stride }}u];
  # if act
  second += part[at + {{ s * m_pad * stride + group }}u];
  # endif
  # endfor
  # if scaled
  first *= x_scale[m];
  second *= x_scale[m];
  # endif
  store(m, n, first, second);
}
