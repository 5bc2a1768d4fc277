// Last pass of sampling: the best token of all parts, or with `draw` for sequences of a temperature: the exact cuts of
// top-k and top-p (radix select, 8 bits a turn, on the order-preserving bits of the logits; entries that tie with a cut
// stay), then the inverse of the cumulative distribution in the order of ids. Host twin: `sampler.py`. The token is
// 0xffffffff where none may be chosen. Remembers it for its slot, counts it for the penalties, and with step[ADVANCE]
// moves the step buffer on by one token, so that the same program can run again without the host.
// step (read and written)
// [draw: logits (n_seqs, n_vocab) f32, adjusted]  parts (n_seqs, parts, 4) u32
// [draw: bins (n_seqs, 512, 2) u32;  list (n_seqs, 1 + parts + listed) u32]
// slots (max_seqs,) u32;  out (n_seqs,) u32  [counting: counts (max_seqs, n_vocab) u32]
// constants: n_vocab, n_valid, slice, parts, listed, wg, draw, counting, st;  grid: (n_seqs, 1, 1)
# import "lib/sampling.wgsl" as sampling
{{ bind("step", "u32", "read_write") }}
# if draw
{{ bind("logits", "f32") }}
# endif
{{ bind("parts", "vec4<u32>") }}
# if draw
{{ bind("bins", "vec2<u32>") }}
{{ bind("list", "u32") }}
# endif
{{ bind("slots", "u32", "read_write") }}
{{ bind("out", "u32", "read_write") }}
# if counting
{{ bind("counts", "u32", "read_write") }}
# endif
{{ sampling.whole(parts, wg, draw) }}

// What barriers hang on must be uniform, and `step` is written here: row, temperature, top_k, top_p.
var<workgroup> record: vec4<u32>;

# if draw
# set places = [256, slice, parts] | max
{{ sampling.rule() }}
{{ sampling.scan(wg) }}
{{ sampling.edges(wg) }}

var<workgroup> tally: array<atomic<u32>, {{ places }}>;
var<workgroup> found: vec2<u32>;
var<workgroup> total: u32;  // of all tallies
var<workgroup> last: atomic<u32>;

struct Open {  // the tokens in the bins that a filter cuts through
  base: u32,  // of the logits
  ids: u32,  // where the list of them begins
  n: u32,
  all: bool,  // the list was too short: they are anywhere
}

fn key_of(v: f32) -> u32 {
  let bits = bitcast<u32>(v);
  return select(bits | 0x80000000u, ~bits, (bits & 0x80000000u) != 0u);
}

fn token_of(open: Open, i: u32) -> u32 {
  return select(list[open.ids + min(i, {{ listed - 1 }}u)], i, open.all);
}

fn clear(n: u32, lid: u32) {
  workgroupBarrier();
  for (var i = lid; i < n; i += {{ wg }}u) {
    atomicStore(&tally[i], 0u);
  }
  workgroupBarrier();
}

// The first of n tallies at which their sum reaches `goal` (n where none does), and the sum before it.
fn reach(goal: u32, n: u32, lid: u32) -> vec2<u32> {
  if (lid == 0u) {
    found = vec2<u32>(n, 0u);
  }
  workgroupBarrier();
  let each = (n + {{ wg - 1 }}u) / {{ wg }}u;
  let end = min((lid + 1u) * each, n);
  var here = 0u;
  for (var i = lid * each; i < end; i++) {
    here += atomicLoad(&tally[i]);
  }
  let sum = scan(vec2<u32>(here, 0u), lid);
  var before = sum.x;
  if (lid == 0u) {
    total = sum.z;
  }
  if (before < goal && before + here >= goal) {
    for (var i = lid * each; i < end; i++) {
      let next = before + atomicLoad(&tally[i]);
      if (next >= goal) {
        found = vec2<u32>(i, before);
        break;
      }
      before = next;
    }
  }
  return workgroupUniformLoad(&found);
}

// The largest key from `floor` on at which the tokens of a bin with this key and above weigh at least `goal`: by count,
// or by mass. 0 where they all weigh less.
fn select_key(rule: Rule, open: Open, bin: u32, floor: u32, goal: u32, by_mass: bool, lid: u32) -> u32 {
  var prefix = 0u;
  var mask = 0u;
  var missing = goal;
  for (var shift = 24i; shift >= 0i; shift -= 8i) {
    clear(256u, lid);
    for (var i = lid; i < open.n; i += {{ wg }}u) {
      let v = logits[open.base + token_of(open, i)];
      let key = key_of(v);
      let mass = mass_of(rule, v);
      if ((key & mask) == prefix && key >= floor && mass > 0u && bin_of(rule, v) == bin) {
        atomicAdd(&tally[255u - ((key >> u32(shift)) & 255u)], select(1u, mass, by_mass));
      }
    }
    workgroupBarrier();
    let at = reach(missing, 256u, lid);
    if (at.x > 255u) {
      return 0u;
    }
    missing -= at.y;
    prefix |= (255u - at.x) << u32(shift);
    mask |= 255u << u32(shift);
  }
  return prefix;
}

// Adds the masses of the open tokens from `bin` on whose key is not below `floor` to the tallies of their parts, or with
// `together` to the first.
fn weigh(rule: Rule, open: Open, bin: u32, floor: u32, together: bool, lid: u32) {
  for (var i = lid; i < open.n; i += {{ wg }}u) {
    let token = token_of(open, i);
    let v = logits[open.base + token];
    if (key_of(v) >= floor && bin_of(rule, v) >= bin) {
      atomicAdd(&tally[select(token / {{ slice }}u, 0u, together)], mass_of(rule, v));
    }
  }
  workgroupBarrier();
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

fn drawn(s: u32, rule: Rule, top_k: u32, top_p: f32, random: u32, lid: u32) -> u32 {
  let base = s * {{ 1 + parts + listed }}u;
  var open = Open(s * {{ n_vocab }}u, base + {{ 1 + parts }}u, 0u, false);
  var from_bin = {{ sampling.bins }}u;
  var least = 0u;  // key
  if (top_k > 0u || top_p < 1.0) {
    open.n = list[base];
    if (open.n > {{ listed }}u) {
      open.n = {{ n_valid }}u;
      open.all = true;
    }
    load_bins(s, lid);
    let cut = edges(top_k, top_p, lid);
    from_bin = min(cut.x, cut.y);
    var kept = upto[{{ sampling.bins - 1 }}].y;
    if (cut.x < {{ sampling.bins }}u) {
      least = select_key(rule, open, cut.x, 0u, top_k - before_bin(cut.x, 0u), false, lid);
      clear(1u, lid);
      weigh(rule, open, cut.x, least, true, lid);
      kept = before_bin(cut.x, 1u) + atomicLoad(&tally[0]);
    }
    if (top_p < 1.0) {
      let goal = top_p_goal(top_p, kept);
      let bin = min(first_bin(goal, 1u, lid), min(cut.x, {{ sampling.bins - 1 }}u));
      least = max(least, select_key(rule, open, bin, least, goal - before_bin(bin, 1u), true, lid));
    }
  }
  workgroupBarrier();
  for (var i = lid; i < {{ parts }}u; i += {{ wg }}u) {
    atomicStore(&tally[i], list[base + 1u + i]);
  }
  if (lid == 0u) {
    atomicStore(&last, 0u);
  }
  workgroupBarrier();
  weigh(rule, open, from_bin, least, false, lid);
  reach(0xffffffffu, {{ parts }}u, lid);
  let point = high_product(random, total);
  let part = reach(point + 1u, {{ parts }}u, lid);
  let start = min(part.x, {{ parts - 1 }}u) * {{ slice }}u;
  let n = min({{ slice }}u, {{ n_valid }}u - start);
  workgroupBarrier();
  for (var i = lid; i < n; i += {{ wg }}u) {
    let v = logits[open.base + start + i];
    let mass = select(0u, mass_of(rule, v), key_of(v) >= least);
    atomicStore(&tally[i], mass);
    if (mass > 0u) {
      atomicMax(&last, start + i + 1u);
    }
  }
  workgroupBarrier();
  let at = reach(point - part.y + 1u, n, lid);
  return select(start + at.x, atomicLoad(&last) - 1u, at.x >= n);
}
# endif

@compute @workgroup_size({{ wg }})
fn main(@builtin(workgroup_id) wid: vec3<u32>, @builtin(local_invocation_index) lid: u32) {
  let s = wid.x;
  let seq = {{ st.seqs }}u + s * {{ st.SEQ_WORDS }}u;
  if (lid == 0u) {
    let row = select(0xffffffffu, step[seq + {{ st.LOGITS_ROW }}u], s < step[{{ st.N_SEQS }}]);
    record = vec4<u32>(row, step[seq + {{ st.TEMPERATURE }}u], step[seq + {{ st.TOP_K }}u], step[seq + {{ st.TOP_P }}u]);
  }
  let known = workgroupUniformLoad(&record);
  let row = known.x;
  if (row == 0xffffffffu) {
    return;
  }
  let temperature = bitcast<f32>(known.y);
  let inverse = 1.0 / max(temperature, 1e-6);
  let all = whole(s, inverse, lid);
  var token = all.token;
  # if draw
  if (temperature > 0.0) {
    let rule = rule_of(all, inverse, bitcast<f32>(step[seq + {{ st.MIN_P }}u]));
    let random = hash(step[seq + {{ st.SEED }}u], step[seq + {{ st.DRAW_POSITION }}u]);
    token = drawn(s, rule, known.z, bitcast<f32>(known.w), random, lid);
  }
  workgroupBarrier();
  # endif
  if (lid == 0u) {
    let slot = step[seq + {{ st.SLOT }}u];
    slots[slot] = token;
    out[s] = token;
    # if counting
    if (token < {{ n_vocab }}u) {
      counts[slot * {{ n_vocab }}u + token] += 1u;
    }
    # endif
    if (step[{{ st.ADVANCE }}] != 0u) {
      step[{{ st.tokens }}u + row] = token;
      step[{{ st.positions }}u + row] += 1u;
      step[seq + {{ st.KV_LEN }}u] += 1u;
      step[seq + {{ st.DRAW_POSITION }}u] += 1u;
    }
  }
}
