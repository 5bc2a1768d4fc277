{# What the formats with a grid share: rows of magnitudes t0, t1, ..., a byte each, to signed bytes of half a chunk. #}

{# With `wg` the n rows of the grid in workgroup memory, {w}_rows, which {w}_prepare fills with wg threads: lanes look up rows
   far apart, which costs there a third of what it does in a cache. #}
# macro table(w, type, n, wg)
# if wg
var<workgroup> {{ w }}_rows: array<{{ type }}, {{ n }}>;

fn {{ w }}_prepare(lid: u32) {
  for (var i = lid; i < {{ n }}u; i += {{ wg }}u) {
    {{ w }}_rows[i] = {{ w }}_t[i];
  }
}
# endif
# endmacro

{# Four magnitudes, not 0, with signs (1: negative) at the lowest bits of s' bytes: complement and add one, byte by byte. #}
# macro signed(w)
fn {{ w }}_signed(v: u32, s: u32) -> u32 {
  let negative = s & 0x01010101u;
  return (v ^ (negative * 255u)) + negative;
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

{# Rows of -1, 0, 1 and a delta of 1/8, up or down: a byte is 8 * value + 9 + 8 * delta, from 0 to 18. {w}_codes(i) is row i as
   8 * (value + 1), the values of its first half at bits 3 and 4 of the bytes, those of its second two bits above. #}
# macro codes(w, n, wg)
fn {{ w }}_packed(row: vec2<u32>) -> u32 {
  let mask = vec2<u32>(0x03030303u);
  let codes = ((row & mask) + vec2<u32>(0x01010101u)) & mask;
  return (codes.x << 3u) | (codes.y << 5u);
}

# if wg
var<workgroup> {{ w }}_rows: array<u32, {{ n }}>;

fn {{ w }}_prepare(lid: u32) {
  for (var i = lid; i < {{ n }}u; i += {{ wg }}u) {
    {{ w }}_rows[i] = {{ w }}_packed({{ w }}_t[i]);
  }
}
# endif

fn {{ w }}_codes(i: u32) -> u32 {
  return {{ "%s_rows[i]" % w if wg else "%s_packed(%s_t[i])" % (w, w) }};
}
# endmacro

{# Rows of 8 from codes t<first> on; n<first> and on are 2 in each byte where delta is up. #}
# macro rows_of_iq1(w, first)
vec4<u32>({% for g in (first, first + 1) %}(t{{ g }} & 0x18181818u) | n{{ g }}, ((t{{ g }} >> 2u) & 0x18181818u) | n{{ g }}{{ ", " if loop.first }}{% endfor %})
# endmacro
