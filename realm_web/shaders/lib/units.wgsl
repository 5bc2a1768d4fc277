{# Matrix units from WGSL: chromium_experimental_subgroup_matrix, which Dawn has (naga's wgpu_cooperative_matrix would do,
   but wgpu-native 29 refuses the feature). Fragments are 16 x 16: operands f16, sums f32. A subgroup of 32 works on one
   fragment together, so every call is in control flow that is uniform over it; Tint cannot prove that of what hangs on the
   number of the subgroup, hence the diagnostic. #}
# macro enable()
enable f16;
enable chromium_experimental_subgroup_matrix;
diagnostic(off, chromium.subgroup_matrix_uniformity);
# endmacro

{# Row i of the fragment is at array[at + i * stride]. #}
# macro load(side, array, at, stride)
subgroupMatrixLoad<subgroup_matrix_{{ side }}<f16, 16, 16>, row_major>(&{{ array }}, {{ at }}, {{ stride }}u)
# endmacro

{# Column i of the sums goes to array[at + i * stride]. #}
# macro keep(sum, array, at, stride)
subgroupMatrixStore<col_major>(&{{ array }}, {{ at }}, {{ sum }}, {{ stride }}u);
# endmacro

{# A chunk of weights times 64 (scales stay clear of f16's smallest numbers, weights up to 1023 of its largest), as
   {w}_Code, which {w}_code(c) fetches, and {w}_as_f16(code, c) turns into f16. Of every four weights the second and the
   third change places, in half_rows too: a mask and a xor turn two bytes of a word into 1152 + byte in f16. #}
# macro halves(w, own)
# if own.ints is defined
alias {{ w }}_Code = {{ w }}_Raw;

fn {{ w }}_code(c: u32) -> {{ w }}_Code {
  return {{ w }}_fetch(c);
}

fn {{ w }}_as_f16(code: {{ w }}_Code, c: u32) -> array<vec4<f16>, 8> {
  let v = {{ w }}_ints(code, c);
  let s = vec2<f16>(64.0 * v.s);
  # if own.minimum
  let m = vec2<f16>(-64.0 * v.m);
  # endif
  return array<vec4<f16>, 8>(
  # for i in range(8)
  # set half = "xy"[i // 4]
  # set word = "v.%s.%s" % ("ab"[i // 4], "xyzw"[i % 4])
  # set bytes = "bitcast<vec4<f16>>((vec2<u32>(%s, %s >> 8u) & vec2<u32>(0x00ff00ffu)) ^ vec2<u32>(0x64806480u))" % (word, word)
  # set code = "%s - %d.0h" % (bytes, 1152 + own.offset)
    {{ "fma(%s, vec4<f16>(s.%s), vec4<f16>(m.%s))" % (code, half, half) if own.minimum else "(%s) * s.%s" % (code, half) }}{{ "," if not loop.last }}
  # endfor
  );
}
# else
alias {{ w }}_Code = array<vec4<f32>, 8>;

fn {{ w }}_code(c: u32) -> {{ w }}_Code {
  return {{ w }}_decode(c);
}

fn {{ w }}_as_f16(code: {{ w }}_Code, c: u32) -> array<vec4<f16>, 8> {
  return array<vec4<f16>, 8>({% for i in range(8) %}vec4<f16>(64.0 * code[{{ i }}].xzyw){{ ", " if not loop.last }}{% endfor %});
}
# endif
# endmacro
