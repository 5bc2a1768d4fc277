{# Chunks of nibbles to bytes by a codebook of 16 signed bytes (`grids.CODEBOOKS`). #}

{# {w}_halves(q): the bytes of the low nibbles and of the high nibbles. With `wg` by a table of byte pairs in workgroup memory
   that {w}_prepare fills with wg threads; else by selecting. #}
# macro lookup(w, name, wg)
# set words = codebook_words(name)
fn {{ w }}_entry(code: vec4<u32>) -> vec4<u32> {
  let odd = (code & vec4<u32>(4u)) != vec4<u32>(0u);
  let low = select(vec4<u32>({{ words[0] }}u), vec4<u32>({{ words[1] }}u), odd);
  let high = select(vec4<u32>({{ words[2] }}u), vec4<u32>({{ words[3] }}u), odd);
  let word = select(low, high, (code & vec4<u32>(8u)) != vec4<u32>(0u));
  return (word >> ((code & vec4<u32>(3u)) << vec4<u32>(3u))) & vec4<u32>(255u);
}

# if wg
var<workgroup> {{ w }}_pairs: array<u32, 256>;

fn {{ w }}_prepare(lid: u32) {
  for (var i = lid; i < 256u; i += {{ wg }}u) {
    let pair = {{ w }}_entry(vec4<u32>(i & 15u, i >> 4u, 0u, 0u));
    {{ w }}_pairs[i] = pair.x | (pair.y << 16u);
  }
}

fn {{ w }}_word(q: u32) -> vec2<u32> {
  let a = {{ w }}_pairs[q & 255u] | ({{ w }}_pairs[(q >> 8u) & 255u] << 8u);
  let b = {{ w }}_pairs[(q >> 16u) & 255u] | ({{ w }}_pairs[q >> 24u] << 8u);
  return vec2<u32>((a & 0xffffu) | (b << 16u), (a >> 16u) | (b & 0xffff0000u));
}

fn {{ w }}_halves(q: vec4<u32>) -> array<vec4<u32>, 2> {
  # for i in "xyzw"
  let {{ i }} = {{ w }}_word(q.{{ i }});
  # endfor
  return array<vec4<u32>, 2>(vec4<u32>(x.x, y.x, z.x, w.x), vec4<u32>(x.y, y.y, z.y, w.y));
}
# else
fn {{ w }}_bytes(codes: vec4<u32>) -> vec4<u32> {
  return {{ w }}_entry(codes) | ({{ w }}_entry(codes >> vec4<u32>(8u)) << vec4<u32>(8u))
    | ({{ w }}_entry(codes >> vec4<u32>(16u)) << vec4<u32>(16u)) | ({{ w }}_entry(codes >> vec4<u32>(24u)) << vec4<u32>(24u));
}

fn {{ w }}_halves(q: vec4<u32>) -> array<vec4<u32>, 2> {
  let mask = vec4<u32>(0x0f0f0f0fu);
  return array<vec4<u32>, 2>({{ w }}_bytes(q & mask), {{ w }}_bytes((q >> vec4<u32>(4u)) & mask));
}
# endif
# endmacro
