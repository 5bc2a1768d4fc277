{# Pairs (nibbles in order: word w holds weights 8w to 8w + 7, the first lowest) to bytes by a codebook of 16 signed bytes
   (`grids.CODEBOOKS`). #}
# import "quant/lib_table.wgsl" as table

{# {w}_halves(q, c): the bytes of chunk c's first 16 weights and of its last. With `wg` by a table of pairs of weights in
   workgroup memory that {w}_prepare fills with wg threads; else by selecting. #}
# macro lookup(w, name, wg, room)
# set words = codebook_words(name)
fn {{ w }}_entry(code: vec4<u32>) -> vec4<u32> {
  let odd = (code & vec4<u32>(4u)) != vec4<u32>(0u);
  let low = select(vec4<u32>({{ words[0] }}u), vec4<u32>({{ words[1] }}u), odd);
  let high = select(vec4<u32>({{ words[2] }}u), vec4<u32>({{ words[3] }}u), odd);
  let word = select(low, high, (code & vec4<u32>(8u)) != vec4<u32>(0u));
  return (word >> ((code & vec4<u32>(3u)) << vec4<u32>(3u))) & vec4<u32>(255u);
}

# if wg
fn {{ w }}_row(i: u32) -> u32 {
  let pair = {{ w }}_entry(vec4<u32>(i & 15u, i >> 4u, 0u, 0u));
  return pair.x | (pair.y << 8u);
}

{{ table.rows(w, "u32", 256, wg, room) }}

fn {{ w }}_eight(q: u32, c: u32) -> vec2<u32> {
  return vec2<u32>(
    {{ w }}_at(q & 255u, c) + {{ w }}_at((q >> 8u) & 255u, c) * 65536u,
    {{ w }}_at((q >> 16u) & 255u, c) + {{ w }}_at(q >> 24u, c) * 65536u
  );
}
# else
fn {{ w }}_four(codes: u32) -> u32 {
  let entries = {{ w }}_entry(vec4<u32>(codes, codes >> 4u, codes >> 8u, codes >> 12u) & vec4<u32>(15u));
  return entries.x | (entries.y << 8u) | (entries.z << 16u) | (entries.w << 24u);
}

fn {{ w }}_eight(q: u32, c: u32) -> vec2<u32> {
  return vec2<u32>({{ w }}_four(q & 0xffffu), {{ w }}_four(q >> 16u));
}
# endif

fn {{ w }}_halves(q: vec4<u32>, c: u32) -> array<vec4<u32>, 2> {
  # for i in "xyzw"
  let {{ i }} = {{ w }}_eight(q.{{ i }}, c);
  # endfor
  return array<vec4<u32>, 2>(vec4<u32>(x, y), vec4<u32>(z, w));
}
# endmacro

{# For repack: the low nibbles of four words in order. #}
# macro in_order()
// Four codes, one to a byte, as four nibbles.
fn four(codes: vec4<u32>) -> vec4<u32> {
  let pairs = codes | (codes >> vec4<u32>(4u));
  return (pairs & vec4<u32>(255u)) | ((pairs >> vec4<u32>(8u)) & vec4<u32>(0xff00u));
}

fn eights(v: vec4<u32>) -> vec2<u32> {
  let codes = four(v & vec4<u32>(0x0f0f0f0fu));
  return codes.xz | (codes.yw << vec2<u32>(16u));
}
# endmacro
