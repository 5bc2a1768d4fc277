{# Q6_K: q low nibbles in Q4_0's order; b crumbs of the high 2 bits;
   s = int8 scale of the chunk's first 16 weights, of its last 16, f16 d in the high half. #}
# import "quant/lib_crumbs.wgsl" as crumb
# macro decode(w, bind)
{{ bind(w ~ "_q", "vec4<u32>") }}
{{ bind(w ~ "_b", "vec2<u32>") }}
{{ bind(w ~ "_s", "u32") }}

fn {{ w }}_decode(c: u32) -> array<vec4<f32>, 8> {
  let q = {{ w }}_q[c];
  let b = {{ w }}_b[c];
  let s = {{ w }}_s[c];
  let scales = vec2<f32>(unpack4xI8(s).xy) * unpack2x16float(s).y;
  # for i in range(8)
  let n{{ i }} = unpack4xU8(((q.{{ "xyzw"[i % 4] }} >> {{ 4 * (i // 4) }}u) & 0x0f0f0f0fu) | ({{ crumb.four("b", i) }} << 4u));
  # endfor
  return array<vec4<f32>, 8>(
  # for i in range(8)
    scales.{{ "xy"[i // 4] }} * (vec4<f32>(n{{ i }}) - 32.0){{ "," if not loop.last }}
  # endfor
  );
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
