{# TQ1_0: packed as TQ2_0, which is a quarter more memory than five base-3 digits to a byte, and no arithmetic. #}
# import "quant/lib_crumbs.wgsl" as crumb
# set run = 2
# set offset, halves, minimum = 32, false, none
# macro ints(w, bind, wg, room, run)
{{ crumb.one_scale(w, bind, 8, run) }}
# endmacro

# macro repack(bind)
{{ bind("q", "vec2<u32>", "read_write") }}
{{ bind("s", "u32", "read_write") }}

// Digit n of the four bytes of a word, a digit to a byte: a byte is a fraction of 256, times 3^n leaves the rest after n
// digits, times 3 once more has the digit above the point.
fn digits(v: u32, n: u32) -> u32 {
  var power = 1u;
  for (var i = 0u; i < n; i++) {
    power *= 3u;
  }
  let mask = 0x00ff00ffu;
  let even = (((((v & mask) * power) & mask) * 3u) >> 8u) & mask;
  let odd = ((((((v >> 8u) & mask) * power) & mask) * 3u) >> 8u) & mask;
  return even | (odd << 8u);
}

fn repack(c: u32, dst: u32) {
  // ggml: 32 bytes with the digits of chunks 0-4, 16 bytes with 5 half chunks, 4 bytes with 4 digits each, f16 d
  let at = (c >> 3u) * 54u;
  let j = c & 7u;
  var out = vec2<u32>(0u);
  for (var i = 0u; i < 8u; i++) {  // four weights at a time
    var from_ = at + 4u * i;
    var n = j;
    if (j >= 5u) {
      n = (j - 5u) * 2u + (i >> 2u);
      from_ = at + 32u + 4u * (i & 3u);
      if (n == 5u) {
        n = i & 3u;
        from_ = at + 48u;
      }
    }
    let code = digits(word(from_), n) << (2u * (i & 3u));
    if (i < 4u) {
      out.x |= code;
    } else {
      out.y |= code;
    }
  }
  q[dst] = out;
  if (j == 0u) {
    s[dst >> 3u] = half_at(at + 52u);
  }
}
# endmacro
