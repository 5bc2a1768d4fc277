{# Crumbs (codes of two bits): byte b of word w holds weight 16w + 4k + b at bit 2k. #}

{# Four weights of a vec2 of crumbs, a code to a byte: weights 4i to 4i + 3 of the chunk. #}
# macro four(q, i)
(({{ q }}.{{ "xy"[i // 4] }} >> {{ 2 * (i % 4) }}u) & 0x03030303u)
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

{# Weights d * (code - 1): q holds crumbs, s the f16 d of `per` chunks. #}
# macro decode_ternary(w, bind, per)
{{ bind(w ~ "_q", "vec2<u32>") }}
{{ bind(w ~ "_s", "u32") }}

fn {{ w }}_decode(c: u32) -> array<vec4<f32>, 8> {
  let q = {{ w }}_q[c];
  let d = unpack2x16float({{ w }}_s[c / {{ per }}u]).x;
  return array<vec4<f32>, 8>(
  # for i in range(8)
    d * (vec4<f32>(unpack4xU8({{ four("q", i) }})) - 1.0){{ "," if not loop.last }}
  # endfor
  );
}
# endmacro
