{# TQ2_0: q holds crumbs, s the f16 d of a 256-block: weight = d * (code - 1). #}
# import "quant/lib_crumbs.wgsl" as crumb
# set run = 2
# set offset, halves, minimum = 32, false, none
# macro ints(w, bind, wg, room, run)
{{ crumb.one_scale(w, bind, 8, run) }}
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
