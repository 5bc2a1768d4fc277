{# Bytes of a codebook of 16 signed bytes (`grids.CODEBOOKS`) for four codes below 16 in each word. #}
# macro lookup(w, name)
# set words = codebook_words(name)
fn {{ w }}_entry(code: vec4<u32>) -> vec4<u32> {
  let odd = (code & vec4<u32>(4u)) != vec4<u32>(0u);
  let low = select(vec4<u32>({{ words[0] }}u), vec4<u32>({{ words[1] }}u), odd);
  let high = select(vec4<u32>({{ words[2] }}u), vec4<u32>({{ words[3] }}u), odd);
  let word = select(low, high, (code & vec4<u32>(8u)) != vec4<u32>(0u));
  return (word >> ((code & vec4<u32>(3u)) << vec4<u32>(3u))) & vec4<u32>(255u);
}

fn {{ w }}_lookup(codes: vec4<u32>) -> vec4<u32> {
  return {{ w }}_entry(codes) | ({{ w }}_entry(codes >> vec4<u32>(8u)) << vec4<u32>(8u))
    | ({{ w }}_entry(codes >> vec4<u32>(16u)) << vec4<u32>(16u)) | ({{ w }}_entry(codes >> vec4<u32>(24u)) << vec4<u32>(24u));
}
# endmacro
