{# What the sampling kernels share. A sequence's probabilities are integers of 2^-30 ("masses"), so every sum of them is
   exact in any order, and the same seed gives the same token.
   `parts` (n_seqs, parts, 4) holds of each slice of the vocabulary: largest logit, its lowest token id, sum of
   exp((logit - largest) / temperature), smallest logit.
   `bins` (n_seqs, 512, 2) holds how many tokens, and how much mass, lie how far below the largest logit. #}
# set lowest = "-3.4e38"
# set bins = 512

# macro whole(parts, wg, draw)
struct Part {
  top: f32,
  token: u32,
  sum: f32,
  low: f32,
}

var<workgroup> pieces: array<Part, {{ wg }}>;

fn joined(a: Part, b: Part, inverse: f32) -> Part {
  var both = a;
  if (b.top > a.top || (b.top == a.top && b.token < a.token)) {
    both.top = b.top;
    both.token = b.token;
  }
  # if draw
  both.sum = a.sum * exp((a.top - both.top) * inverse) + b.sum * exp((b.top - both.top) * inverse);
  both.low = min(a.low, b.low);
  # endif
  return both;
}

// All parts of sequence s together, in every thread.
fn whole(s: u32, inverse: f32, lid: u32) -> Part {
  var mine = Part({{ lowest }}, 0xffffffffu, 0.0, 3.4e38);
  for (var i = lid; i < {{ parts }}u; i += {{ wg }}u) {
    let words = parts[s * {{ parts }}u + i];
    mine = joined(mine, Part(bitcast<f32>(words.x), words.y, bitcast<f32>(words.z), bitcast<f32>(words.w)), inverse);
  }
  pieces[lid] = mine;
  for (var stride = {{ wg // 2 }}u; stride > 0u; stride >>= 1u) {
    workgroupBarrier();
    if (lid < stride) {
      pieces[lid] = joined(pieces[lid], pieces[lid + stride], inverse);
    }
  }
  workgroupBarrier();
  return pieces[0];
}
# endmacro

# macro rule()
struct Rule {
  top: f32,
  inverse: f32,  // of the temperature
  scale: f32,  // 2^30 / sum of all probabilities
  min_p: f32,
  per_bin: f32,  // bins per unit of (top - logit) / temperature
}

// The bins cover what has mass, (top - logit) / temperature < ln(2^30), or less if no logit lies so low. Their width is
// a power of two, so that every kernel and its twin put a token into the same one: 256 to 512 of them for the range.
fn rule_of(all: Part, inverse: f32, min_p: f32) -> Rule {
  let range = clamp((all.top - all.low) * inverse, 1e-6, 21.0);
  let per_bin = bitcast<f32>((262u - (bitcast<u32>(range) >> 23u)) << 23u);
  return Rule(all.top, inverse, 1073741824.0 / all.sum, min_p, per_bin);
}

fn mass_of(rule: Rule, v: f32) -> u32 {
  let p = exp((v - rule.top) * rule.inverse);
  return select(0u, u32(p * rule.scale), p >= rule.min_p && v > {{ lowest }});
}

fn bin_of(rule: Rule, v: f32) -> u32 {
  return u32(clamp((rule.top - v) * rule.inverse * rule.per_bin, 0.0, {{ bins - 1 }}.0));
}
# endmacro

# macro scan(wg)
# set width = 16 if wg > 64 else 8
var<workgroup> sums: array<vec2<u32>, {{ wg }}>;
var<workgroup> rows: array<vec2<u32>, {{ wg // width }}>;  // sums of {{ width }} neighbours

// The sum of every thread's value before this one, and of all. Two barriers: loops are cheaper than a tree's.
fn scan(value: vec2<u32>, lid: u32) -> vec4<u32> {
  workgroupBarrier();
  sums[lid] = value;
  workgroupBarrier();
  let row = lid / {{ width }}u;
  var before = vec2<u32>();
  for (var i = row * {{ width }}u; i < lid; i++) {
    before += sums[i];
  }
  if (lid % {{ width }}u == {{ width - 1 }}u) {
    rows[row] = before + value;
  }
  workgroupBarrier();
  var all = vec2<u32>();
  for (var i = 0u; i < {{ wg // width }}u; i++) {
    before += select(vec2<u32>(), rows[i], i < row);
    all += rows[i];
  }
  return vec4<u32>(before, all);
}
# endmacro

# macro edges(wg)
var<workgroup> upto: array<vec2<u32>, {{ bins }}>;  // tokens and mass of each bin and all before it
var<workgroup> edge: u32;

fn load_bins(s: u32, lid: u32) {
  var here = vec2<u32>();
  for (var b = lid * {{ bins // wg }}u; b < (lid + 1u) * {{ bins // wg }}u; b++) {
    here += bins[s * {{ bins }}u + b];
    upto[b] = here;
  }
  let before = scan(here, lid).xy;
  for (var b = lid * {{ bins // wg }}u; b < (lid + 1u) * {{ bins // wg }}u; b++) {
    upto[b] += before;
  }
  workgroupBarrier();
}

// The first bin at which the count (0) or the mass (1) reaches `goal`; {{ bins }} where none does.
fn first_bin(goal: u32, channel: u32, lid: u32) -> u32 {
  if (lid == 0u) {
    edge = {{ bins }}u;
  }
  workgroupBarrier();
  for (var b = lid * {{ bins // wg }}u; b < (lid + 1u) * {{ bins // wg }}u; b++) {
    if (upto[b][channel] >= goal && (b == 0u || upto[max(b, 1u) - 1u][channel] < goal)) {
      edge = b;
    }
  }
  return workgroupUniformLoad(&edge);
}

fn before_bin(b: u32, channel: u32) -> u32 {
  return select(upto[max(b, 1u) - 1u][channel], 0u, b == 0u);
}

fn top_p_goal(top_p: f32, kept: u32) -> u32 {
  return max(u32(ceil(top_p * f32(kept))), 1u);
}

// The bins that a filter cuts through: that of top-k ({{ bins }}: none), and first and last of those where top-p may end,
// which hangs on how much of the top-k bin stays ({{ bins }}: none). All tokens of bins before these stay.
fn edges(top_k: u32, top_p: f32, lid: u32) -> vec3<u32> {
  var cut = vec3<u32>({{ bins }}u);
  if (top_k > 0u) {
    cut.x = first_bin(top_k, 0u, lid);
  }
  if (top_p < 1.0) {
    let at_least = before_bin(cut.x, 1u);
    let at_most = upto[min(cut.x, {{ bins - 1 }}u)].y;
    cut.y = first_bin(top_p_goal(top_p, at_least), 1u, lid);
    cut.z = first_bin(top_p_goal(top_p, at_most), 1u, lid);
  }
  return cut;
}
# endmacro

# macro likeliest(wg, listed)
// The 20 best of the tokens that `offer` is called with: by value, ties to the lower id. First every thread names the
// best of its own in `firsts`: only the 20 threads with the best of these, by rank, hold anything better than the 20th.
var<workgroup> firsts: array<vec2<u32>, {{ wg }}>;  // bits of the value, id
var<workgroup> bound: vec2<u32>;
var<workgroup> offers: array<vec2<u32>, {{ listed }}>;
var<workgroup> n_offers: atomic<u32>;

fn better(a: vec2<u32>, b: vec2<u32>) -> bool {
  let x = bitcast<f32>(a.x);
  let y = bitcast<f32>(b.x);
  return x > y || (x == y && a.y < b.y);
}

fn nothing() -> vec2<u32> {
  return vec2<u32>(bitcast<u32>({{ lowest }}), 0xffffffffu);
}

fn find_bound(first: vec2<u32>, lid: u32) {
  firsts[lid] = first;
  if (lid == 0u) {
    bound = nothing();
    atomicStore(&n_offers, 0u);
  }
  workgroupBarrier();
  var rank = 0u;
  for (var i = 0u; i < {{ wg }}u; i++) {
    rank += select(0u, 1u, better(firsts[i], first));
  }
  if (rank == 19u) {
    bound = first;
  }
  workgroupBarrier();
}

fn offer(one: vec2<u32>) {
  if (one.y != 0xffffffffu && !better(bound, one)) {
    offers[min(atomicAdd(&n_offers, 1u), {{ listed - 1 }}u)] = one;
  }
}

fn rank_of(one: vec2<u32>, n: u32) -> u32 {
  var rank = 0u;
  for (var i = 0u; i < n; i++) {
    rank += select(0u, 1u, better(offers[i], one));
  }
  return rank;
}
# endmacro
