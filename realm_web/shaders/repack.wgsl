// Raw GGUF blocks to the aligned layout of `quants.FORMATS`: one thread per chunk of 32 weights.
// source (n_bytes,) u32: whole blocks, from byte 0;  params: [0] chunks here; the i-th is number c = [2] + i of a tensor and
// goes to [1] + c / [3] * [4] + c % [3]: runs of [3] chunks, each [4] after the one before
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
    let c = params[2] + id.x;
    repack(id.x, params[1] + c / params[3] * params[4] + c % params[3]);
  }
}
