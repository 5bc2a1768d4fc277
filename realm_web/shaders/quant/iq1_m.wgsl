{# IQ1_M: q per chunk: rows 0 and 1 of 11 bits each, the low 10 bits of row 2; s, 6 words per 256-block: f16 d, then in the high
   half two bits per chunk: the high bits of its scales; a nibble per chunk: the low pairs of its scales (of 16 weights each); then
   a half per chunk: the high bit of row 2, row 3, a bit per row: 1 where delta is up; t the grid.
   weight = d * (2 * scale + 1) * (row + delta). #}
# import "quant/lib_grid.wgsl" as grid
# import "quant/lib_run.wgsl" as runs
# set run = 2
# set offset, halves, minimum = 9, true, none
# set table = true
# macro ints(w, bind, wg, run)
{{ runs.codes(w, bind, "u32", run) }}
{{ bind(w ~ "_s", "u32") }}
{{ bind(w ~ "_t", "u32") }}

{# Four copies of so large a table are no faster than one. #}
{{ grid.rows(w, "u32", 2048, wg, 0, run) }}

{{ runs.fetch(w, "u32", run, {"d": w ~ "_s[(c >> 3u) * 6u]", "low": w ~ "_s[(c >> 3u) * 6u + 1u]", "h": w ~ "_s[(c >> 3u) * 6u + 2u + ((c & 7u) >> 1u)]"}) }}

fn {{ w }}_ints(raw: {{ w }}_Raw, c: u32) -> Ints {
  let j = c & 7u;
  let h = raw.h >> (16u * (c & 1u));
  let low = (raw.low >> (4u * j)) << 1u;
  let high = raw.d >> (13u + 2u * j);
  let scales = (vec2<u32>(low, low >> 2u) & vec2<u32>(6u)) | (vec2<u32>(high, high >> 1u) & vec2<u32>(8u));
  let scale = unpack2x16float(raw.d).x * fma(vec2<f32>(scales), vec2<f32>(0.125), vec2<f32>(0.125));
  # for g in range(4)
  let n{{ g }} = ((h >> {{ 12 + g }}u) & 1u) * 0x02020202u;
  # endfor
{{ grid.four_of_iq1(w) }}
  return Ints({{ grid.rows_of_iq1(0, "n0", "n1") }}, {{ grid.rows_of_iq1(2, "n2", "n3") }}, scale, vec2<f32>());
}
# endmacro

# macro repack(bind)
{{ bind("q", "u32", "read_write") }}
{{ bind("s", "u32", "read_write") }}

// The nibbles of chunk j's rows in the block at `at`.
fn nibbles(at: u32, j: u32) -> u32 {
  return half_at(at + 32u + 2u * j);
}

// The half of chunk j.
fn half_of(at: u32, j: u32) -> u32 {
  let h = nibbles(at, j);
  let row3 = byte(at + 3u + 4u * j) | (((h >> 12u) & 7u) << 8u);
  let up = ((~h >> 3u) & 1u) | ((~h >> 6u) & 2u) | ((~h >> 9u) & 4u) | ((~h >> 12u) & 8u);
  return ((h >> 10u) & 1u) | (row3 << 1u) | (up << 12u);
}

fn repack(c: u32, dst: u32) {
  // ggml: low bytes of 32 rows; a nibble per row: 3 high bits, 1 where delta is down; 4 halves: 4 scales of 3 bits, 4 bits of d
  let at = (c >> 3u) * 56u;
  let j = c & 7u;
  let low = word(at + 4u * j);
  let h = nibbles(at, j);
  let high = (vec3<u32>(h) >> vec3<u32>(0u, 4u, 8u)) & vec3<u32>(7u);
  let rows = ((vec3<u32>(low) >> vec3<u32>(0u, 8u, 16u)) & vec3<u32>(255u)) | (high << vec3<u32>(8u));
  q[dst] = rows.x | (rows.y << 11u) | (rows.z << 22u);
  if (j == 0u) {
    let to = (dst >> 3u) * 6u;
    var d = 0u;
    var top = 0u;
    var pairs = 0u;
    for (var i = 0u; i < 4u; i++) {
      let scales = half_at(at + 48u + 2u * i);
      d |= (scales >> 12u) << (4u * i);
      for (var n = 0u; n < 4u; n++) {
        let scale = (scales >> (3u * n)) & 7u;
        pairs |= (scale & 3u) << (8u * i + 2u * n);
        top |= (scale >> 2u) << (4u * i + n);
      }
      s[to + 2u + i] = half_of(at, 2u * i) | (half_of(at, 2u * i + 1u) << 16u);
    }
    s[to] = d | (top << 16u);
    s[to + 1u] = pairs;
  }
}
# endmacro
