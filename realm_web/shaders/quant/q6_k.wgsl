{# Q6_K: q low nibbles in Q4_0's order; b crumbs of the high 2 bits;
   s = int8 scale of the chunk's first 16 weights, of its last 16, f16 d in the high half. #}
# import "quant/lib_crumbs.wgsl" as crumb
# set offset, halves, minimum = 32, true, none
# macro ints(w, bind)
{{ bind(w ~ "_q", "vec4<u32>") }}
{{ bind(w ~ "_b", "vec2<u32>") }}
{{ bind(w ~ "_s", "u32") }}

struct {{ w }}_Raw {
  q: vec4<u32>,
  b: vec2<u32>,
  s: u32,
}

fn {{ w }}_fetch(c: u32) -> {{ w }}_Raw {
  return {{ w }}_Raw({{ w }}_q[c], {{ w }}_b[c], {{ w }}_s[c]);
}

fn {{ w }}_ints(raw: {{ w }}_Raw, c: u32) -> Ints {
  let low = (raw.q & vec4<u32>(0x0f0f0f0fu)) | {{ crumb.sixteen("raw.b", 0, 4) }};
  let high = ((raw.q >> vec4<u32>(4u)) & vec4<u32>(0x0f0f0f0fu)) | {{ crumb.sixteen("raw.b", 1, 4) }};
  let scales = vec2<f32>(unpack4xI8(raw.s).xy) * unpack2x16float(raw.s).y;
  return Ints(low, high, scales, vec2<f32>());
}
# endmacro

# macro repack(bind)
{{ bind("q", "vec4<u32>", "read_write") }}
{{ bind("b", "vec2<u32>", "read_write") }}
{{ bind("s", "u32", "read_write") }}

{{ crumb.pack() }}

fn repack(c: u32, dst: u32) {
  // ggml: 128 bytes ql, 64 bytes qh, 16 int8 scales, f16 d. Halves of 128 weights; in a half, chunk k (0..3) has its
  // low nibbles in ql[32*(k&1) ..] (low or high nibble by k>>1) and its high bits in qh at bits 2*k.
  let at = (c >> 3u) * 210u;
  let j = c & 7u;
  let half = j >> 2u;
  let k = j & 3u;
  let low = at + 64u * half + 32u * (k & 1u);
  let shift = vec4<u32>(4u * (k >> 1u));
  let mask = vec4<u32>(0x0f0f0f0fu);
  q[dst] = ((words(low) >> shift) & mask) | (((words(low + 16u) >> shift) & mask) << vec4<u32>(4u));
  b[dst] = crumbs(at + 128u + 32u * half, 2u * k);
  s[dst] = byte(at + 192u + 2u * j) | (byte(at + 193u + 2u * j) << 8u) | (half_at(at + 208u) << 16u);
}
# endmacro
