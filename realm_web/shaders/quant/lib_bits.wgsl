{# Lanes: byte b of a word holds the bit of weight 4i + b at bit i. #}

{# The bits of weights 4 * first to 4 * first + 15, one to a byte at bit `to` of it (first <= 4, to <= 7). #}
# macro at(word, first, to)
# set ns = namespace(terms=[])
# for i in range(first, first + 4)
# set shift = to - i
# set moved = "(%s << %du)" % (word, shift) if shift > 0 else ("(%s >> %du)" % (word, -shift) if shift else word)
# set ns.terms = ns.terms + [moved]
# endfor
(vec4<u32>({{ ns.terms | join(", ") }}) & vec4<u32>({{ "0x%02x%02x%02x%02xu" % (2**to, 2**to, 2**to, 2**to) }}))
# endmacro

{# The same as the fifth bit of a code. #}
# macro fifth(word, first)
{{ at(word, first, 4) }}
# endmacro

{# For repack: 32 bits in order as lanes. #}
# macro lanes()
fn lanes(bits: u32) -> u32 {
  var result = 0u;
  for (var i = 0u; i < 8u; i++) {
    result |= ((((bits >> (4u * i)) & 15u) * 0x00204081u) & 0x01010101u) << i;
  }
  return result;
}
# endmacro
