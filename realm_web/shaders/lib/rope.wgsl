{# Rotation of the heads of q and k by their positions (RoPE), with the binding `turns`: turns per position as fractions of
   2^32. The phase is an integer product that wraps at whole turns, so no precision is lost at far positions. Pairs are
   (i, i + rot_dim / 2) if `neox`, else (2i, 2i + 1); `magnitude` is YaRN's factor on cos and sin. #}
# macro functions(head_dim, rot_dim, neox, magnitude)
// The element that is rotated together with element d of a head.
fn partner(d: u32) -> u32 {
  # if rot_dim == 0
  return d;
  # else
  # if neox
  let other = select(d + {{ rot_dim // 2 }}u, d - {{ rot_dim // 2 }}u, d >= {{ rot_dim // 2 }}u);
  # else
  let other = d ^ 1u;
  # endif
  # if rot_dim < head_dim
  return select(d, other, d < {{ rot_dim }}u);
  # else
  return other;
  # endif
  # endif
}

fn turned(value: f32, other: f32, d: u32, position: u32) -> f32 {
  # if rot_dim == 0
  return value;
  # else
  # if rot_dim < head_dim
  if (d >= {{ rot_dim }}u) {
    return value;
  }
  # endif
  # if neox
  let second = d >= {{ rot_dim // 2 }}u;
  let i = select(d, d - {{ rot_dim // 2 }}u, second);
  # else
  let second = (d & 1u) == 1u;
  let i = d >> 1u;
  # endif
  let angle = f32(bitcast<i32>(position * turns[i])) * 1.4629180792671596e-9;  // 2 pi / 2^32
  return (value * cos(angle) + select(-other, other, second) * sin(angle)) * {{ "%.9g" % magnitude }};
  # endif
}
# endmacro
