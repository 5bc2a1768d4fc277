{# For repack: 32 bits in order as lanes: byte b holds bit 4i + b at bit i. #}
# macro lanes()
fn lanes(bits: u32) -> u32 {
  var result = 0u;
  for (var i = 0u; i < 8u; i++) {
    result |= ((((bits >> (4u * i)) & 15u) * 0x00204081u) & 0x01010101u) << i;
  }
  return result;
}
# endmacro
