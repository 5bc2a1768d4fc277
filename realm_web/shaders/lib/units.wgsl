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

{# Row i of the sums goes to array[at + i * stride], or their column i. #}
# macro keep(units, by_rows, sum, array, at, stride)
# if units == "naga"
{{ "coopStoreT" if by_rows else "coopStore" }}({{ sum }}, &{{ array }}[{{ at }}], {{ stride }}u);
# else
subgroupMatrixStore<{{ "row_major" if by_rows else "col_major" }}>(&{{ array }}, {{ at }}, {{ sum }}, {{ stride }}u);
# endif
# endmacro
