{# IQ4_NL: q and s as Q4_0, a nibble is an index into a codebook: weight = d * codebook[nibble]. #}
# import "quant/lib_codebook.wgsl" as codebook
# macro decode(w, bind)
{{ bind(w ~ "_q", "vec4<u32>") }}
{{ bind(w ~ "_s", "u32") }}

{{ codebook.lookup(w, "iq4") }}

fn {{ w }}_decode(c: u32) -> array<vec4<f32>, 8> {
  let q = {{ w }}_q[c];
  let d = unpack2x16float({{ w }}_s[c]).x;
{{ codebook.chunk(w, "q", ("d", "d")) }}
}
# endmacro

# macro repack(bind)
{{ bind("q", "vec4<u32>", "read_write") }}
{{ bind("s", "u32", "read_write") }}

fn repack(c: u32, dst: u32) {
  let at = c * 18u;
  s[dst] = half_at(at);
  q[dst] = words(at + 2u);
}
# endmacro
