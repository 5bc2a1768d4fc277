{# IQ1_S: q per chunk: rows 0 and 1 of 11 bits each, the low 10 bits of row 2; s, 5 words per 256-block: f16 d, then a half per
   chunk: the high bit of row 2, row 3, 3 bits scale, 1 where delta is up; t the grid.
   weight = d * (2 * scale + 1) * (row + delta). #}
# import "quant/lib_grid.wgsl" as grid
# import "quant/lib_run.wgsl" as runs
# set run = 2
# set offset, halves, minimum = 9, false, none
# set table = true
# macro ints(w, bind, wg, run)
{{ runs.codes(w, bind, "u32", run) }}
{{ bind(w ~ "_s", "u32") }}
{{ bind(w ~ "_t", "u32") }}

{# Four copies of so large a table are no faster than one. #}
{{ grid.rows(w, "u32", 2048, wg, 0, run) }}

{{ runs.fetch(w, "u32", run, {"d": w ~ "_s[(c >> 3u) * 5u]", "s": w ~ "_s[(c >> 3u) * 5u + 1u + ((c & 7u) >> 1u)]"}) }}

fn {{ w }}_ints(raw: {{ w }}_Raw, c: u32) -> Ints {
  let h = raw.s >> (16u * (c & 1u));
  let scale = unpack2x16float(raw.d).x * fma(f32((h >> 11u) & 14u), 0.125, 0.125);
  let n = ((h >> 15u) & 1u) * 0x02020202u;
{{ grid.four_of_iq1(w) }}
  return Ints({{ grid.rows_of_iq1(0, "n") }}, {{ grid.rows_of_iq1(2, "n") }}, vec2<f32>(scale), vec2<f32>());
}
# endmacro

# macro repack(bind)
{{ bind("q", "u32", "read_write") }}
{{ bind("s", "u32", "read_write") }}

// The half of chunk j of the block at `at`.
fn half_of(at: u32, j: u32) -> u32 {
  let h = half_at(at + 34u + 2u * j);
  let row3 = byte(at + 5u + 4u * j) | (((h >> 9u) & 7u) << 8u);
  return ((h >> 8u) & 1u) | (row3 << 1u) | (h & 0x7000u) | (~h & 0x8000u);
}

fn repack(c: u32, dst: u32) {
  // ggml: f16 d, low bytes of 32 rows, 8 halves: 4 times 3 high bits, scale, 1 where delta is down
  let at = (c >> 3u) * 50u;
  let j = c & 7u;
  let low = word(at + 2u + 4u * j);
  let h = half_at(at + 34u + 2u * j);
  let high = (vec3<u32>(h) >> vec3<u32>(0u, 3u, 6u)) & vec3<u32>(7u);
  let rows = ((vec3<u32>(low) >> vec3<u32>(0u, 8u, 16u)) & vec3<u32>(255u)) | (high << vec3<u32>(8u));
  q[dst] = rows.x | (rows.y << 11u) | (rows.z << 22u);
  if (j == 0u) {
    let to = (dst >> 3u) * 5u;
    s[to] = half_at(at);
    for (var i = 0u; i < 4u; i++) {
      s[to + 1u + i] = half_of(at, 2u * i) | (half_of(at, 2u * i + 1u) << 16u);
    }
  }
}
# endmacro
