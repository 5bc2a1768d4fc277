{# Q1_0: q holds lanes (byte b: weight 4i + b at bit i), s the f16 d of a 128-block: weight = bit ? d : -d. A bit is taken
   64 times, as most of them then go left: left shifts and masks run on different units of a GPU. #}
# import "quant/lib_bits.wgsl" as bits
# import "quant/lib_run.wgsl" as runs
# set run = 2
# set offset, halves, minimum = 32, false, none
# macro ints(w, bind, wg, room, run)
{{ runs.codes(w, bind, "u32", run) }}
{{ bind(w ~ "_s", "u32") }}

{{ runs.fetch(w, "u32", run, {"s": w ~ "_s[c >> 2u]"}) }}

fn {{ w }}_ints(raw: {{ w }}_Raw, c: u32) -> Ints {
  let scale = 0.03125 * unpack2x16float(raw.s).x;
  return Ints({{ bits.at("raw.q", 0, 6) }}, {{ bits.at("raw.q", 4, 6) }}, vec2<f32>(scale), vec2<f32>());
}
# endmacro

# macro repack(bind)
{{ bind("q", "u32", "read_write") }}
{{ bind("s", "u32", "read_write") }}

fn repack(c: u32, dst: u32) {
  // ggml: f16 d, 128 bits in order
  let at = (c >> 2u) * 18u;
  let bits = word(at + 2u + 4u * (c & 3u));
  var lanes = 0u;
  for (var i = 0u; i < 32u; i++) {
    lanes |= ((bits >> i) & 1u) << (8u * (i & 3u) + (i >> 2u));
  }
  q[dst] = lanes;
  if ((c & 3u) == 0u) {
    s[dst >> 2u] = half_at(at);
  }
}
# endmacro
