{# Q2_0: q holds crumbs, s the f16 d of a 64-block: weight = d * (code - 1). #}
# import "quant/lib_crumbs.wgsl" as crumb
# set run = 2
# set offset, halves, minimum = 32, false, none
# macro ints(w, bind, wg, room, run)
{{ crumb.one_scale(w, bind, 2, run) }}
# endmacro

# macro repack(bind)
{{ bind("q", "vec2<u32>", "read_write") }}
{{ bind("s", "u32", "read_write") }}

// Pairs of bits from ggml's order (weight 4b + k of a word at bits 2k of byte b) to crumbs: a 4 x 4 transposition.
fn crumbs(pairs: u32) -> u32 {
  var out = 0u;
  for (var i = 0u; i < 16u; i++) {
    out |= ((pairs >> (2u * i)) & 3u) << (8u * (i & 3u) + 2u * (i >> 2u));
  }
  return out;
}

fn repack(c: u32, dst: u32) {
  let at = (c >> 1u) * 18u;
  let from_ = at + 2u + 8u * (c & 1u);
  q[dst] = vec2<u32>(crumbs(word(from_)), crumbs(word(from_ + 4u)));
  if ((c & 1u) == 0u) {
    s[dst >> 1u] = half_at(at);
  }
}
# endmacro
