{# Crumbs (codes of two bits): byte b of word w holds weight 16w + 4k + b at bit 2k. #}

{# The codes of a half (0 or 1) of a chunk, one to a byte: a vec2 of crumbs to a vec4. #}
# macro sixteen(q, half)
((vec4<u32>({{ q }}.{{ "xy"[half] }}) >> vec4<u32>(0u, 2u, 4u, 6u)) & vec4<u32>(0x03030303u))
# endmacro

{# The weights of a format that has nothing but crumbs and an f16 scale for so many chunks. #}
# macro one_scale(w, bind, chunks)
{{ bind(w ~ "_q", "vec2<u32>") }}
{{ bind(w ~ "_s", "u32") }}

struct {{ w }}_Raw {
  q: vec2<u32>,
  s: u32,
}

fn {{ w }}_fetch(c: u32) -> {{ w }}_Raw {
  return {{ w }}_Raw({{ w }}_q[c], {{ w }}_s[c / {{ chunks }}u]);
}

fn {{ w }}_ints(raw: {{ w }}_Raw, c: u32) -> Ints {
  return Ints({{ sixteen("raw.q", 0) }}, {{ sixteen("raw.q", 1) }}, vec2<f32>(unpack2x16float(raw.s).x), vec2<f32>());
}
# endmacro

{# For repack: the crumbs of 32 codes in the low two bits of the bytes at `at`, after a shift. #}
# macro pack()
fn crumbs(at: u32, shift: u32) -> vec2<u32> {
  let mask = vec4<u32>(0x03030303u);
  let a = (words(at) >> vec4<u32>(shift)) & mask;
  let b = (words(at + 16u) >> vec4<u32>(shift)) & mask;
  return vec2<u32>(
    a.x | (a.y << 2u) | (a.z << 4u) | (a.w << 6u),
    b.x | (b.y << 2u) | (b.z << 4u) | (b.w << 6u)
  );
}
# endmacro
