// out[m, offset + n] = epilogue(sum_k w[n, k] * x[m, k]) for many rows m: tiles of bm x 64 outputs, 32 deep, dequantised
// into workgroup memory; each of 256 threads keeps bm/16 x 4 sums in registers.
// step;  x (n_rows, k) f32;  weight (n, k) or (2n, k) with act;  [bias (out_stride,) f32];
// out (n_rows, out_stride) f32, which is added to with `residual`
// act "silu_mul", "gelu_mul": a tile holds 32 gate rows and their 32 up rows.
// constants: fmt, k, n, act, bias, residual, scale, softcap, out_stride, out_offset, st;  tuning: bm (32 or 64), f16 (the weights' tile in half)
// grid: (ceil(n / (32 if act else 64)), ceil(n_rows / bm), 1)
# import "lib/epilogue.wgsl" as epilogue
# set t = "f16" if f16 else "f32"
# set rm = bm // 16
# set bn = 32 if act else 64
{{ "enable f16;" if f16 }}
{{ bind("step", "u32") }}
{{ bind("x", "vec4<f32>") }}
{{ weight("w", fmt) }}
{{ epilogue.store(bind, st, n, act, bias, residual, scale, softcap, out_stride, out_offset, st.N_ROWS) }}

var<workgroup> xs: array<f32, {{ 32 * bm }}>;  // (k, m): activations may be beyond f16's 65504
var<workgroup> ws: array<{{ t }}, 2048>;  // (k, n)

@compute @workgroup_size(256)
fn main(@builtin(workgroup_id) wid: vec3<u32>, @builtin(local_invocation_index) lid: u32) {
  let m0 = wid.y * {{ bm }}u;
  if (m0 >= step[{{ st.N_ROWS }}]) {
    return;
  }
  let last_row = step[{{ st.N_ROWS }}] - 1u;
  let n0 = wid.x * {{ bn }}u;
  let tn = lid % 16u;
  let tm = lid / 16u;
  # for i in range(rm)
  var acc{{ i }} = vec4<f32>();
  # endfor
  for (var c = 0u; c < {{ k // 32 }}u; c++) {
    // threads 0..63 decode one chunk of one weight row each, the other 192 fetch the rows of x
    if (lid < 64u) {
      # if act
      let n = min(n0 + (lid >> 1u), {{ n - 1 }}u) + (lid & 1u) * {{ n }}u;
      # else
      let n = min(n0 + lid, {{ n - 1 }}u);
      # endif
      let v = w_decode(n * {{ k // 32 }}u + c);
      # for i in range(32)
      ws[{{ i * 64 }}u + lid] = {{ t }}(v[{{ i // 4 }}].{{ "xyzw"[i % 4] }});
      # endfor
    } else {
      for (var i = lid - 64u; i < {{ bm * 8 }}u; i += 192u) {
        let m = i % {{ bm }}u;
        let q = i / {{ bm }}u;
        let v = x[min(m0 + m, last_row) * {{ k // 4 }}u + c * 8u + q];
        # for j in range(4)
        xs[(q * 4u + {{ j }}u) * {{ bm }}u + m] = v.{{ "xyzw"[j] }};
        # endfor
      }
    }
    workgroupBarrier();
    for (var k = 0u; k < 32u; k++) {
      let b = vec4<f32>(vec4<{{ t }}>({% for j in range(4) %}ws[k * 64u + tn * 4u + {{ j }}u]{{ ", " if not loop.last }}{% endfor %}));
      # for i in range(rm)
      acc{{ i }} += xs[k * {{ bm }}u + tm * {{ rm }}u + {{ i }}u] * b;
      # endfor
    }
    workgroupBarrier();
  }
  # for i in range(rm)
  # if act
  store(m0 + tm * {{ rm }}u + {{ i }}u, n0 + tn * 2u, acc{{ i }}.x, acc{{ i }}.y);
  store(m0 + tm * {{ rm }}u + {{ i }}u, n0 + tn * 2u + 1u, acc{{ i }}.z, acc{{ i }}.w);
  # else
  # for j in range(4)
  store(m0 + tm * {{ rm }}u + {{ i }}u, n0 + tn * 4u + {{ j }}u, acc{{ i }}.{{ "xyzw"[j] }}, 0.0);
  # endfor
  # endif
  # endfor
}
