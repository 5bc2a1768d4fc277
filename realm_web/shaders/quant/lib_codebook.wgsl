{# Four weights of a codebook of 16 signed bytes (`grids.CODEBOOKS`), for four codes below 16. #}
# macro lookup(w, name)
# set words = codebook_words(name)
fn {{ w }}_lookup(code: vec4<u32>) -> vec4<f32> {
  let odd = (code & vec4<u32>(4u)) != vec4<u32>(0u);
  let low = select(vec4<u32>({{ words[0] }}u), vec4<u32>({{ words[1] }}u), odd);
  let high = select(vec4<u32>({{ words[2] }}u), vec4<u32>({{ words[3] }}u), odd);
  let word = select(low, high, code >= vec4<u32>(8u));
  let top = word << (vec4<u32>(24u) - ((code & vec4<u32>(3u)) << vec4<u32>(3u)));
  return vec4<f32>(bitcast<vec4<i32>>(top) >> vec4<u32>(24u));
}
# endmacro

{# The eight vectors of a chunk of nibbles q, times `scales[0]` and, for its second half, `scales[1]`. #}
# macro chunk(w, q, scales)
  return array<vec4<f32>, 8>(
  # for i in range(8)
    {{ scales[i // 4] }} * {{ w }}_lookup(unpack4xU8(({{ q }}.{{ "xyzw"[i % 4] }} >> {{ 4 * (i // 4) }}u) & 0x0f0f0f0fu)){{ "," if not loop.last }}
  # endfor
  );
# endmacro
