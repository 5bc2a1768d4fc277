{# What the formats with a grid share: rows of magnitudes t0, t1, ..., a byte each, to signed bytes of half a chunk. #}
# import "quant/lib_table.wgsl" as table

{# {w}_at(i, c): row i of the grid's n, for chunk c: with `wg` from workgroup memory, which {w}_prepare fills with wg threads. #}
# macro rows(w, type, n, wg, room, run=1)
# if wg
fn {{ w }}_row(i: u32) -> {{ type }} {
  return {{ w }}_t[i];
}

{{ table.rows(w, type, n, wg, room, run) }}
# else
fn {{ w }}_at(i: u32, c: u32) -> {{ type }} {
  return {{ w }}_t[i];
}
# endif
# endmacro

{# Four magnitudes, not 0, with signs (1: negative) at the lowest bits of s' bytes: complement and add one, byte by byte. What
   is `odd` is even then, and has its 1 back if its lowest bit is not complemented. #}
# macro signed(w, odd=false)
fn {{ w }}_signed(v: u32, s: u32) -> u32 {
  let negative = s & 0x01010101u;
  return {{ "v ^ (negative * 254u)" if odd else "(v ^ (negative * 255u)) + negative" }};
}
# endmacro

{# Rows of 8 from t<first> on, with lanes of signs. #}
# macro rows_of_8(w, first, signs)
vec4<u32>({% for g in (first, first + 1) %}{% for i in (0, 1) %}{{ w }}_signed(t{{ g }}.{{ "xy"[i] }}, {{ signs }} >> {{ 2 * g + i }}u){{ ", " if not (loop.last and g > first) }}{% endfor %}{% endfor %})
# endmacro

{# Rows of 4 from t<first> on. #}
# macro rows_of_4(w, first, signs)
vec4<u32>({% for g in range(first, first + 4) %}{{ w }}_signed(t{{ g }}, {{ signs }} >> {{ g }}u){{ ", " if not loop.last }}{% endfor %})
# endmacro

{# For repack: 8 signs from seven: an even number is negative. #}
# macro even()
fn even(seven: u32) -> u32 {
  return seven | ((countOneBits(seven) & 1u) << 7u);
}
# endmacro

{# Rows of -1, 0, 1 and a delta of 1/8, up or down: a byte is 8 * value + 9 + 8 * delta, from 0 to 18. Of codes t<first> on
   (`grids.table`: 8 * (value + 1), the first half at bits 3 and 4 of the bytes, the second two bits below); `up` (and `second`, if
   the second row has its own) is 2 in each byte where delta is up. #}
# macro rows_of_iq1(first, up, second=none)
# set of = (up, second or up)
vec4<u32>({% for g in (0, 1) %}(t{{ first + g }} & 0x18181818u) | {{ of[g] }}, ((t{{ first + g }} << 2u) & 0x18181818u) | {{ of[g] }}{{ ", " if loop.first }}{% endfor %})
# endmacro

{# The rows t0 to t3 that the words raw.q and h name. #}
# macro four_of_iq1(w)
  let t0 = {{ w }}_at(raw.q & 2047u, c);
  let t1 = {{ w }}_at((raw.q >> 11u) & 2047u, c);
  let t2 = {{ w }}_at((raw.q >> 22u) | ((h & 1u) << 10u), c);
  let t3 = {{ w }}_at((h >> 1u) & 2047u, c);
# endmacro
