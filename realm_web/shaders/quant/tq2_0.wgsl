{# TQ2_0: q holds crumbs, s the f16 d of a 256-block: weight = d * (code - 1). #}
# import "quant/lib_crumbs.wgsl" as crumb
# set offset, halves, minimum = 1, false, none
# macro ints(w, bind)
{{ bind(w ~ "_q", "vec2<u32>") }}
{{ bind(w ~ "_s", "u32") }}

struct {{ w }}_Raw {
  q: vec2<u32>,
  s: u32,
}

fn {{ w }}_fetch(c: u32) -> {{ w }}_Raw {
  return {{ w }}_Raw({{ w }}_q[c], {{ w }}_s[c / 8u]);
}

fn {{ w }}_ints(raw: {{ w }}_Raw, c: u32) -> Ints {
  return Ints({{ crumb.sixteen("raw.q", 0) }}, {{ crumb.sixteen("raw.q", 1) }}, vec2<f32>(unpack2x16float(raw.s).x), vec2<f32>());
}
# endmacro

# macro repack(bind)
{{ bind("q", "vec2<u32>", "read_write") }}
{{ bind("s", "u32", "read_write") }}

{{ crumb.pack() }}

fn repack(c: u32, dst: u32) {
  // ggml: 64 bytes of pairs (32 for each half of the block, chunk k of it at bits 2k), f16 d
  let at = (c >> 3u) * 66u;
  let j = c & 7u;
  q[dst] = crumbs(at + 32u * (j >> 2u), 2u * (j & 3u));
  if (j == 0u) {
    s[dst >> 3u] = half_at(at + 64u);
  }
}
# endmacro
