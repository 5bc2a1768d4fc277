// Draw a token: temperature, then min-p, top-k, top-p, then the inverse of the cumulative distribution in id order.
// One workgroup per sequence. Probabilities are integers of 2^-30, so every sum is exact in any order, and the same
// seed gives the same token; the thresholds of top-k and top-p are found digit by digit (radix select, 8 bits a pass)
// on the order-preserving bits of the logits. Entries that tie with a threshold are kept. Host twin: `sampler.py`.
// step;  logits (n_seqs, n_vocab) f32;  best (n_seqs, parts, 2) u32 of sample_partial;  drawn (n_seqs,) u32
// constants: n_vocab, parts, wg, st;  grid: (n_seqs, 1, 1)
{{ bind("step", "u32") }}
{{ bind("logits", "f32") }}
{{ bind("best", "vec2<u32>") }}
{{ bind("drawn", "u32", "read_write") }}

var<workgroup> floats: array<f32, {{ wg }}>;
var<workgroup> bins: array<atomic<u32>, 256>;
var<workgroup> sums: array<u32, {{ [wg, 256] | max }}>;
var<workgroup> chosen: vec2<u32>;

struct Rule {
  base: u32,
  top: f32,
  inverse_temperature: f32,
  scale: f32,  // 2^30 / sum of all probabilities
  min_p: f32,
  key_k: u32,
  key_p: u32,
}

fn key_of(v: f32) -> u32 {
  let bits = bitcast<u32>(v);
  return select(bits | 0x80000000u, ~bits, (bits & 0x80000000u) != 0u);
}

fn mass_of(rule: Rule, i: u32) -> u32 {
  let v = logits[rule.base + i];
  let p = exp((v - rule.top) * rule.inverse_temperature);
  let key = key_of(v);
  return select(0u, u32(p * rule.scale), p >= rule.min_p && key >= rule.key_k && key >= rule.key_p);
}

// The largest key whose entries and all above weigh at least `goal`; by count, or by mass.
fn select_key(rule: Rule, goal: u32, by_mass: bool, lid: u32) -> u32 {
  var prefix = 0u;
  var mask = 0u;
  var missing = goal;
  for (var shift = 24i; shift >= 0i; shift -= 8i) {
    for (var b = lid; b < 256u; b += {{ wg }}u) {
      atomicStore(&bins[b], 0u);
    }
    workgroupBarrier();
    for (var i = lid; i < {{ n_vocab }}u; i += {{ wg }}u) {
      let v = logits[rule.base + i];
      let key = key_of(v);
      if ((key & mask) == prefix) {
        var weight = 1u;
        if (by_mass) {
          weight = mass_of(rule, i);
        } else if (exp((v - rule.top) * rule.inverse_temperature) < rule.min_p) {
          weight = 0u;
        }
        atomicAdd(&bins[(key >> u32(shift)) & 255u], weight);
      }
    }
    workgroupBarrier();
    if (lid == 0u) {
      var above = 0u;
      var b = 255u;
      loop {
        let here = atomicLoad(&bins[b]);
        if (above + here >= missing || b == 0u) {
          break;
        }
        above += here;
        b--;
      }
      chosen = vec2<u32>(b, above);
    }
    let found = workgroupUniformLoad(&chosen);
    missing -= min(missing, found.y);
    prefix |= found.x << u32(shift);
    mask |= 255u << u32(shift);
  }
  return prefix;
}

fn high_product(a: u32, b: u32) -> u32 {
  let low = (a & 0xffffu) * (b & 0xffffu);
  let m1 = (a >> 16u) * (b & 0xffffu) + (low >> 16u);
  let m2 = (a & 0xffffu) * (b >> 16u) + (m1 & 0xffffu);
  return (a >> 16u) * (b >> 16u) + (m1 >> 16u) + (m2 >> 16u);
}

fn hash(seed: u32, position: u32) -> u32 {
  var h = seed ^ (position * 0x9e3779b9u);
  for (var i = 0u; i < 2u; i++) {
    h = h * 747796405u + 2891336453u;
    let w = ((h >> ((h >> 28u) + 4u)) ^ h) * 277803737u;
    h = (w >> 22u) ^ w;
  }
  return h;
}

// Sum of every thread's value before this one in `sums`, and the total.
fn scan(value: u32, lid: u32) -> vec2<u32> {
  sums[lid] = value;
  for (var stride = 1u; stride < {{ wg }}u; stride <<= 1u) {
    workgroupBarrier();
    let before = select(0u, sums[max(lid, stride) - stride], lid >= stride);
    workgroupBarrier();
    sums[lid] += before;
  }
  workgroupBarrier();
  return vec2<u32>(sums[lid] - value, sums[{{ wg - 1 }}]);
}

@compute @workgroup_size({{ wg }})
fn main(@builtin(workgroup_id) wid: vec3<u32>, @builtin(local_invocation_index) lid: u32) {
  if (wid.x >= step[{{ st.N_SEQS }}]) {
    return;
  }
  let seq = {{ st.seqs }}u + wid.x * {{ st.SEQ_WORDS }}u;
  let temperature = bitcast<f32>(step[seq + {{ st.TEMPERATURE }}u]);
  if (temperature <= 0.0) {
    return;
  }
  var rule: Rule;
  rule.base = wid.x * {{ n_vocab }}u;
  rule.inverse_temperature = 1.0 / temperature;
  rule.top = bitcast<f32>(best[wid.x * {{ parts }}u].x);
  for (var i = 1u; i < {{ parts }}u; i++) {
    rule.top = max(rule.top, bitcast<f32>(best[wid.x * {{ parts }}u + i].x));
  }
  rule.min_p = bitcast<f32>(step[seq + {{ st.MIN_P }}u]);
  var mine = 0.0;
  for (var i = lid; i < {{ n_vocab }}u; i += {{ wg }}u) {
    mine += exp((logits[rule.base + i] - rule.top) * rule.inverse_temperature);
  }
  floats[lid] = mine;
  for (var stride = {{ wg // 2 }}u; stride > 0u; stride >>= 1u) {
    workgroupBarrier();
    if (lid < stride) {
      floats[lid] += floats[lid + stride];
    }
  }
  workgroupBarrier();
  rule.scale = 1073741824.0 / floats[0];

  let top_k = step[seq + {{ st.TOP_K }}u];
  if (top_k > 0u) {
    rule.key_k = select_key(rule, top_k, false, lid);
  }
  let each = {{ (n_vocab + wg - 1) // wg }}u;
  let first = lid * each;
  let end = min(first + each, {{ n_vocab }}u);
  let top_p = bitcast<f32>(step[seq + {{ st.TOP_P }}u]);
  if (top_p < 1.0) {
    var mass = 0u;
    for (var i = first; i < end; i++) {
      mass += mass_of(rule, i);
    }
    let kept = scan(mass, lid).y;
    workgroupBarrier();
    rule.key_p = select_key(rule, max(u32(ceil(top_p * f32(kept))), 1u), true, lid);
  }
  var mass = 0u;
  for (var i = first; i < end; i++) {
    mass += mass_of(rule, i);
  }
  let before = scan(mass, lid);
  let random = hash(step[seq + {{ st.SEED }}u], step[seq + {{ st.DRAW_POSITION }}u]);
  var left = high_product(random, before.y);
  if (left >= before.x && left < before.x + mass) {
    left -= before.x;
    for (var i = first; i < end; i++) {
      let here = mass_of(rule, i);
      if (left < here) {
        drawn[wid.x] = i;
        break;
      }
      left -= here;
    }
  }
}
