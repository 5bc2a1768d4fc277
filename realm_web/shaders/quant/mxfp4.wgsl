{# MXFP4: q holds nibbles, indices into a codebook of doubled values, s the halved scale as f32. #}
# import "quant/lib_codebook.wgsl" as codebook
# macro decode(w, bind)
{{ bind(w ~ "_q", "vec4<u32>") }}
{{ bind(w ~ "_s", "u32") }}

{{ codebook.lookup(w, "fp4") }}

fn {{ w }}_decode(c: u32) -> array<vec4<f32>, 8> {
  let q = {{ w }}_q[c];
  let d = bitcast<f32>({{ w }}_s[c]);
{{ codebook.chunk(w, "q", ("d", "d")) }}
}
# endmacro

# macro repack(bind)
{{ bind("q", "vec4<u32>", "read_write") }}
{{ bind("s", "u32", "read_write") }}

fn repack(c: u32, dst: u32) {
  let at = c * 17u;
  let e = byte(at);  // the scale is 2^(e - 127)
  s[dst] = select((e - 1u) << 23u, 0x00200000u << e, e < 2u);
  q[dst] = words(at + 1u);
}
# endmacro
