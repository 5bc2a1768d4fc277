{# Crumbs (codes of two bits): byte b of word w holds weight 16w + 4k + b at bit 2k. #}
# import "quant/lib_run.wgsl" as runs

{# The codes of a half (0 or 1) of a chunk, one to a byte at bit `to` of it: a vec2 of crumbs to a vec4. #}
# macro sixteen(q, half, to=0)
# set word = q ~ "." ~ "xy"[half]
# set ns = namespace(moved=[])
# for k in range(4)
# set shift = to - 2 * k
# set ns.moved = ns.moved + ["%s << %du" % (word, shift) if shift > 0 else ("%s >> %du" % (word, -shift) if shift else word)]
# endfor
(vec4<u32>({{ ns.moved | join(", ") }}) & vec4<u32>({{ "0x%02x%02x%02x%02xu" % (3 * 2**to, 3 * 2**to, 3 * 2**to, 3 * 2**to) }}))
# endmacro

{# The weights of a format that has nothing but crumbs and an f16 scale for so many chunks: weight = d * (code - 1). A code is
   taken 32 times, as most of them then go left: left shifts and masks run on different units of a GPU. The offset is 32. #}
# macro one_scale(w, bind, chunks, run)
{{ runs.codes(w, bind, "vec2<u32>", run) }}
{{ bind(w ~ "_s", "u32") }}

{{ runs.fetch(w, "vec2<u32>", run, {"s": "%s_s[c / %du]" % (w, chunks)}) }}

fn {{ w }}_ints(raw: {{ w }}_Raw, c: u32) -> Ints {
  let scale = 0.03125 * unpack2x16float(raw.s).x;
  return Ints({{ sixteen("raw.q", 0, 5) }}, {{ sixteen("raw.q", 1, 5) }}, vec2<f32>(scale), vec2<f32>());
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
