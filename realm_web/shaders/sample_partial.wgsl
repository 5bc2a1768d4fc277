// First pass of sampling, over slices of the vocabulary: logit bias and penalties, the token mask, the largest logit and
// its lowest token id. With `draw` also the sum of the probabilities, and the zeroes that `sample_bins` counts from.
// counts[slot, id]: how often the answer holds the token; bit 31: the prompt holds it. Repetition (Keskar et al., CTRL)
// over prompt and answer, frequency and presence (OpenAI) over the answer. A token whose bit in the mask is not set, and
// those from n_valid on, which the tokenizer does not have, are never chosen.
// step;  logits (n_seqs, n_vocab) f32;  parts (n_seqs, parts, 4) u32, see lib/sampling.wgsl
// [draw: bins (n_seqs, 512, 2) u32]  [draw and (adjust or masked): adjusted (n_seqs, n_vocab) f32]
// [adjust: bias (max_seqs, n_vocab) f32;  counts (max_seqs, n_vocab) u32]  [masked: mask (max_seqs, ceil(n_vocab / 32)) u32]
// constants: n_vocab, n_valid, slice (of a part), parts, wg, draw, adjust, masked, st;  grid: (parts, n_seqs, 1)
# import "lib/sampling.wgsl" as sampling
{{ bind("step", "u32") }}
{{ bind("logits", "f32") }}
{{ bind("parts", "vec4<u32>", "read_write") }}
# if draw
{{ bind("bins", "vec2<u32>", "read_write") }}
# if adjust or masked
{{ bind("adjusted", "f32", "read_write") }}
# endif
# endif
# if adjust
{{ bind("bias", "f32") }}
{{ bind("counts", "u32") }}
# endif
# if masked
{{ bind("mask", "u32") }}
# endif
# set each = (slice + wg - 1) // wg

var<workgroup> tops: array<f32, {{ wg }}>;
var<workgroup> ids: array<u32, {{ wg }}>;
# if draw
var<workgroup> lows: array<f32, {{ wg }}>;
# endif

fn logit(s: u32, seq: u32, i: u32) -> f32 {
  var v = logits[s * {{ n_vocab }}u + i];
  # if adjust
  let at = step[seq + {{ st.SLOT }}u] * {{ n_vocab }}u + i;
  let count = counts[at];
  v += bias[at];
  if (count != 0u) {
    let repetition = bitcast<f32>(step[seq + {{ st.REPETITION }}u]);
    v = select(v * repetition, v / repetition, v > 0.0);
    let drawn = count & 0x7fffffffu;
    v -= bitcast<f32>(step[seq + {{ st.FREQUENCY }}u]) * f32(drawn);
    v -= select(0.0, bitcast<f32>(step[seq + {{ st.PRESENCE }}u]), drawn > 0u);
  }
  # endif
  # if masked
  if (step[seq + {{ st.DRAW_POSITION }}u] < step[seq + {{ st.MASK_UNTIL }}u]) {
    let word = mask[step[seq + {{ st.SLOT }}u] * {{ (n_vocab + 31) // 32 }}u + (i >> 5u)];
    v = select({{ sampling.lowest }}, v, ((word >> (i & 31u)) & 1u) == 1u);
  }
  # endif
  return v;
}

@compute @workgroup_size({{ wg }})
fn main(@builtin(workgroup_id) wid: vec3<u32>, @builtin(local_invocation_index) lid: u32) {
  let s = wid.y;
  let seq = {{ st.seqs }}u + s * {{ st.SEQ_WORDS }}u;
  if (s >= step[{{ st.N_SEQS }}] || step[seq + {{ st.LOGITS_ROW }}u] == 0xffffffffu) {
    return;
  }
  # if draw
  for (var b = wid.x * {{ wg }}u + lid; b < {{ sampling.bins }}u; b += {{ parts * wg }}u) {
    bins[s * {{ sampling.bins }}u + b] = vec2<u32>();
  }
  # endif
  let start = wid.x * {{ slice }}u;
  let end = min(start + {{ slice }}u, {{ n_valid }}u);
  var values: array<f32, {{ each }}>;
  var top = {{ sampling.lowest }};
  var token = 0xffffffffu;
  # if draw
  var low = 3.4e38;
  # endif
  for (var j = 0u; j < {{ each }}u; j++) {
    let i = start + j * {{ wg }}u + lid;
    values[j] = {{ sampling.lowest }};
    if (i < end) {
      let v = logit(s, seq, i);
      # if draw
      # if adjust or masked
      adjusted[s * {{ n_vocab }}u + i] = v;
      # endif
      low = select(low, min(low, v), v > {{ sampling.lowest }});
      values[j] = v;
      # endif
      if (v > top) {
        top = v;
        token = i;
      }
    }
  }
  tops[lid] = top;
  ids[lid] = token;
  # if draw
  lows[lid] = low;
  # endif
  for (var stride = {{ wg // 2 }}u; stride > 0u; stride >>= 1u) {
    workgroupBarrier();
    if (lid < stride) {
      let other = tops[lid + stride];
      if (other > tops[lid] || (other == tops[lid] && ids[lid + stride] < ids[lid])) {
        tops[lid] = other;
        ids[lid] = ids[lid + stride];
      }
      # if draw
      lows[lid] = min(lows[lid], lows[lid + stride]);
      # endif
    }
  }
  # if draw
  workgroupBarrier();
  let largest = tops[0];
  let smallest = lows[0];
  let inverse = 1.0 / max(bitcast<f32>(step[seq + {{ st.TEMPERATURE }}u]), 1e-6);
  var sum = 0.0;
  for (var j = 0u; j < {{ each }}u; j++) {
    sum += select(0.0, exp((values[j] - largest) * inverse), values[j] > {{ sampling.lowest }});
  }
  workgroupBarrier();
  lows[lid] = sum;
  for (var stride = {{ wg // 2 }}u; stride > 0u; stride >>= 1u) {
    workgroupBarrier();
    if (lid < stride) {
      lows[lid] += lows[lid + stride];
    }
  }
  if (lid == 0u) {
    let words = vec4<u32>(bitcast<u32>(largest), ids[0], bitcast<u32>(lows[0]), bitcast<u32>(smallest));
    parts[s * {{ parts }}u + wid.x] = words;
  }
  # else
  if (lid == 0u) {
    parts[s * {{ parts }}u + wid.x] = vec4<u32>(bitcast<u32>(tops[0]), ids[0], 0u, 0u);
  }
  # endif
}
