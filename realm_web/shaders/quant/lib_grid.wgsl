{# What the formats with a grid share: rows of magnitudes t0, t1, ..., a byte each, to signed bytes of half a chunk. #}

{# Four magnitudes, not 0, with the signs of bits 0 to 3 of s (1: negative): complement and add one, byte by byte. #}
# macro signed(w)
fn {{ w }}_signed(v: u32, s: u32) -> u32 {
  let negative = ((s & 15u) * 0x00204081u) & 0x01010101u;
  return (v ^ (negative * 255u)) + negative;
}
# endmacro

{# Eight signs from seven: an even number is negative. #}
# macro even(w)
fn {{ w }}_even(seven: u32) -> u32 {
  return seven | ((countOneBits(seven) & 1u) << 7u);
}
# endmacro

{# Rows of 8 from t<first> on, with the sign bytes s<first> on. #}
# macro rows_of_8(w, first)
vec4<u32>({% for g in (first, first + 1) %}{% for i in (0, 1) %}{{ w }}_signed(t{{ g }}.{{ "xy"[i] }}, s{{ g }} >> {{ 4 * i }}u){{ ", " if not (loop.last and g > first) }}{% endfor %}{% endfor %})
# endmacro

{# Rows of 4 from t<first> on, with the sign bytes s<first / 2> on. #}
# macro rows_of_4(w, first)
vec4<u32>({% for g in range(first, first + 4) %}{{ w }}_signed(t{{ g }}, s{{ g // 2 }} >> {{ 4 * (g % 2) }}u){{ ", " if not loop.last }}{% endfor %})
# endmacro

{# Four values of -1, 0, 1 to 8 times themselves plus 1, or minus 1. #}
# macro shifted(w)
fn {{ w }}_shifted(v: u32, less: bool) -> u32 {
  let eight = (v & 0x1f1f1f1fu) << 3u;
  let below = ((eight | 0x80808080u) - 0x01010101u) ^ (~eight & 0x80808080u);
  return select(eight | 0x01010101u, below, less);
}
# endmacro

{# Rows of 8 from t<first> on, shifted down where n<first> and on say so. #}
# macro rows_of_iq1(w, first)
vec4<u32>({% for g in (first, first + 1) %}{% for i in (0, 1) %}{{ w }}_shifted(t{{ g }}.{{ "xy"[i] }}, n{{ g }}){{ ", " if not (loop.last and g > first) }}{% endfor %}{% endfor %})
# endmacro
