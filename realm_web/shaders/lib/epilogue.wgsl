{# What follows a matrix product: out = softcap(scale * (act(first, second) + bias)), added to `out` with residual.
   `count` is where in the step their number is, or "" if all rows are there. #}
# import "lib/act.wgsl" as acts
# macro store(bind, st, n, act, bias, residual, scale, softcap, out_stride, out_offset, count)
# if bias
{{ bind("bias", "f32") }}
# endif
{{ bind("out", "f32", "read_write") }}

fn store(m: u32, n: u32, first: f32, second: f32) {
  if (n >= {{ n }}u{{ " || m >= step[%d]" % count if count != "" }}) {
    return;
  }
  let at = m * {{ out_stride }}u + {{ out_offset }}u + n;
{{ value(act, bias, scale, softcap, out_offset) }}
  # if residual
  v += out[at];
  # endif
  out[at] = v;
}
# endmacro

{# In place of `out` into `made`, the workgroup's own, for m_tile rows of `each` columns. #}
# macro keep(bind, act, bias, scale, softcap, out_offset, m_tile, each)
# if bias
{{ bind("bias", "f32") }}
# endif
var<workgroup> made: array<f32, {{ m_tile * each }}>;

fn store(m: u32, n: u32, first: f32, second: f32) {
{{ value(act, bias, scale, softcap, out_offset) }}
  made[m % {{ m_tile }}u * {{ each }}u + n % {{ each }}u] = v;
}
# endmacro

{# `v` of first and second, column n of what a product makes; or of vectors of 4, the n-th of its columns. #}
# macro value(act, bias, scale, softcap, out_offset, wide=false)
  # set t = "vec4<f32>" if wide else "f32"
  # if act
  var v = {{ acts.gated(act, "first", "second", t) }};
  # else
  var v = first;
  # endif
  # if bias
  v += bias[{{ out_offset // 4 if wide else out_offset }}u + n];
  # endif
  # if scale != 1.0
  v *= {{ "%.9g" % scale }};
  # endif
  # if softcap
  v = tanh(clamp(v / {{ "%.9g" % softcap }}, {{ t }}(-15.0), {{ t }}(15.0))) * {{ "%.9g" % softcap }};
  # endif
# endmacro
