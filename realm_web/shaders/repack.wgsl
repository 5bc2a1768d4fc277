// Raw GGUF blocks to the aligned layout of `quants.FORMATS`: one thread per chunk of 32 weights.
// source (n_bytes,) u32: whole blocks, from byte 0;  params: [0] chunks here, [1] first chunk of the destination
// constants: fmt;  grid: (ceil(chunks / 64), 1, 1)
{{ bind("source", "u32") }}
{{ bind("params", "u32") }}

fn word(at: u32) -> u32 {
  let i = at >> 2u;
  let shift = 8u * (at & 3u);
  if (shift == 0u) {
    return source[i];
  }
  return (source[i] >> shift) | (source[i + 1u] << (32u - shift));
}

fn words(at: u32) -> vec4<u32> {
  return vec4<u32>(word(at), word(at + 4u), word(at + 8u), word(at + 12u));
}

fn half_at(at: u32) -> u32 {
  return word(at) & 0xffffu;
}

fn byte(at: u32) -> u32 {
  return (source[at >> 2u] >> (8u * (at & 3u))) & 0xffu;
}

{{ repack(fmt) }}

@compute @workgroup_size(64)
fn main(@builtin(global_invocation_id) id: vec3<u32>) {
  if (id.x < params[0]) {
    repack(id.x, params[1] + id.x);
  }
}
