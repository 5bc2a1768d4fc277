{# Matrix units from WGSL, in the words of two compilers: `naga` (wgpu_cooperative_matrix, wgpu-native) and `tint`
   (chromium_experimental_subgroup_matrix, Dawn). Fragments are 16 x 16: `a` and `b` f16, sums f32. A subgroup of 32
   works on one fragment together, so every call is in control flow that is uniform over it; tint cannot prove that
   of a branch on the number of the subgroup, hence the diagnostic. #}
# macro enable(units)
enable f16;
# if units == "naga"
enable wgpu_cooperative_matrix;
# else
enable chromium_experimental_subgroup_matrix;
diagnostic(off, chromium.subgroup_matrix_uniformity);
# endif
# endmacro

# macro zero(units)
{{ "coop_mat16x16<f32,C>" if units == "naga" else "subgroup_matrix_result<f32, 16, 16>" }}()
# endmacro

{# Row i of the fragment is at array[at + i * stride]. #}
# macro load_a(units, array, at, stride)
# if units == "naga"
coopLoadT<coop_mat16x16<f16,A>>(&{{ array }}[{{ at }}], {{ stride }}u)
# else
subgroupMatrixLoad<subgroup_matrix_left<f16, 16, 16>, row_major>(&{{ array }}, {{ at }}, {{ stride }}u)
# endif
# endmacro

# macro load_b(units, array, at, stride)
# if units == "naga"
coopLoadT<coop_mat16x16<f16,B>>(&{{ array }}[{{ at }}], {{ stride }}u)
# else
subgroupMatrixLoad<subgroup_matrix_right<f16, 16, 16>, row_major>(&{{ array }}, {{ at }}, {{ stride }}u)
# endif
# endmacro

# macro add(units, a, b, sum)
{{ "coopMultiplyAdd" if units == "naga" else "subgroupMatrixMultiplyAccumulate" }}({{ a }}, {{ b }}, {{ sum }})
# endmacro

{# Column i of the sums goes to array[at + i * stride]. #}
# macro keep(units, sum, array, at, stride)
# if units == "naga"
coopStore({{ sum }}, &{{ array }}[{{ at }}], {{ stride }}u);
# else
subgroupMatrixStore<col_major>(&{{ array }}, {{ at }}, {{ sum }}, {{ stride }}u);
# endif
# endmacro

{# A chunk of weights times 64 (scales stay clear of f16's smallest numbers, weights up to 1023 of its largest), as
   {w}_Code, which {w}_code(c) fetches, and {w}_halves(code, c) turns into f16. Of every four weights the second and the
   third change places, in half_rows too: a mask and a xor turn two bytes of a word into 1152 + byte in f16. #}
# macro halves(w, own)
# if own.ints is defined
alias {{ w }}_Code = {{ w }}_Raw;

fn {{ w }}_code(c: u32) -> {{ w }}_Code {
  return {{ w }}_fetch(c);
}

fn {{ w }}_halves(code: {{ w }}_Code, c: u32) -> array<vec4<f16>, 8> {
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

fn {{ w }}_halves(code: {{ w }}_Code, c: u32) -> array<vec4<f16>, 8> {
  return array<vec4<f16>, 8>({% for i in range(8) %}vec4<f16>(64.0 * code[{{ i }}].xzyw){{ ", " if not loop.last }}{% endfor %});
}
# endif
# endmacro
