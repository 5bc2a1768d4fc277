{# Products of integer weights with activations of 8 bits, a chunk of 32 at a time.

   A format's `ints` macro declares its bindings; a struct {w}_Raw with {w}_fetch(c), the loads of chunk c and nothing
   else, so that many can be under way; and {w}_ints(raw, c), the chunk as Ints. A weight is s * (byte - offset) - m: the
   format says its `offset`, whether its two `halves` have scales of their own (else s.x is for both), and whether there is a
   `minimum`: none, of the "chunk" (m.x) or of its "halves".

   Activations are x = d * byte, d of a chunk; beside them stand sums, d times those of the bytes, which is all that offset and
   minimum need. A row of k of them is chunks = k / 32 vec4 of first halves, as many of second halves, and as many of float32:
   d, the chunk's sum, and those of its halves. #}

# macro types()
struct Ints {
  a: vec4<u32>,
  b: vec4<u32>,
  s: vec2<f32>,
  m: vec2<f32>,
}

struct Activations {
  a: vec4<u32>,
  b: vec4<u32>,
  d: f32,
  total: f32,
  sums: vec2<f32>,
}

fn dot16(a: vec4<u32>, b: vec4<u32>) -> i32 {
  return dot4I8Packed(a.x, b.x) + dot4I8Packed(a.y, b.y) + dot4I8Packed(a.z, b.z) + dot4I8Packed(a.w, b.w);
}
# endmacro

{# Chunk c of row m of the activations in the binding x. #}
# macro activations(x, k)
fn {{ x }}_fetch(m: u32, c: u32) -> Activations {
  let at = m * {{ 3 * (k // 32) }}u + c;
  let scales = bitcast<vec4<f32>>({{ x }}[at + {{ k // 16 }}u]);
  return Activations({{ x }}[at], {{ x }}[at + {{ k // 32 }}u], scales.x, scales.y, scales.zw);
}
# endmacro

{# The same of the chunks of a turn, for m_tile rows: planes of 16 bytes of each chunk, first halves, second halves and sums of a
   row after one another, as in the binding. Neighbouring lanes meet no bank twice. #}
# macro staged_activations(x, k, m_tile, lanes)
var<workgroup> {{ x }}_staged: array<array<vec4<u32>, {{ lanes }}>, {{ 3 * m_tile }}>;

fn {{ x }}_staged_fetch(m: u32, lane: u32) -> Activations {
  let scales = bitcast<vec4<f32>>({{ x }}_staged[m * 3u + 2u][lane]);
  return Activations({{ x }}_staged[m * 3u][lane], {{ x }}_staged[m * 3u + 1u][lane], scales.x, scales.y, scales.zw);
}
# endmacro

{# Activations of one row that the workgroup makes for itself: a plane for each of the 12 words of a chunk. Planes are 4 words apart modulo 32, so that the lanes that write a chunk meet no bank twice. #}
# macro plane(k)
{{ k // 32 + (4 - k // 32) % 32 }}
# endmacro

# macro own_activations(x, k)
# set p = plane(k) | trim | int
var<workgroup> {{ x }}_own: array<u32, {{ 12 * p }}>;

fn {{ x }}_fetch(m: u32, c: u32) -> Activations {
  return Activations(
  # for first in (0, 4)
    vec4<u32>({% for i in range(first, first + 4) %}{{ x }}_own[c + {{ i * p }}u]{{ ", " if not loop.last }}{% endfor %}),
  # endfor
    bitcast<f32>({{ x }}_own[c + {{ 8 * p }}u]),
    bitcast<f32>({{ x }}_own[c + {{ 9 * p }}u]),
    bitcast<vec2<f32>>(vec2<u32>({{ x }}_own[c + {{ 10 * p }}u], {{ x }}_own[c + {{ 11 * p }}u]))
  );
}
# endmacro

# macro product(name, offset, halves, minimum)
fn {{ name }}(w: Ints, x: Activations) -> f32 {
# if halves
  let a = x.d * f32(dot16(w.a, x.a)){{ " - %d.0 * x.sums.x" % offset if offset }};
  let b = x.d * f32(dot16(w.b, x.b)){{ " - %d.0 * x.sums.y" % offset if offset }};
  return w.s.x * a + w.s.y * b{{ " - dot(w.m, x.sums)" if minimum }};
# else
  let sum = x.d * f32(dot16(w.a, x.a) + dot16(w.b, x.b)){{ " - %d.0 * x.total" % offset if offset }};
  return w.s.x * sum{{ " - w.m.x * x.total" if minimum }};
# endif
}
# endmacro

{# sum + the same, by fused operations; what is of the activations alone is worked out once for all rows of weights. #}
# macro onto(name, offset, halves, minimum)
fn {{ name }}(sum: f32, w: Ints, x: Activations) -> f32 {
# if halves and offset
  let a = fma(x.d, f32(dot16(w.a, x.a)), {{ -offset }}.0 * x.sums.x);
  let b = fma(x.d, f32(dot16(w.b, x.b)), {{ -offset }}.0 * x.sums.y);
  var all = fma(w.s.x, a, fma(w.s.y, b, sum));
# elif halves
  let dots = fma(w.s.y, f32(dot16(w.b, x.b)), w.s.x * f32(dot16(w.a, x.a)));
  var all = fma(x.d, dots, sum);
# elif offset
  var all = fma(w.s.x, fma(x.d, f32(dot16(w.a, x.a) + dot16(w.b, x.b)), {{ -offset }}.0 * x.total), sum);
# else
  var all = fma(w.s.x, x.d * f32(dot16(w.a, x.a) + dot16(w.b, x.b)), sum);
# endif
# if minimum == "halves"
  all = fma(-w.m.x, x.sums.x, all);
  all = fma(-w.m.y, x.sums.y, all);
# elif minimum
  all = fma(-w.m.x, x.total, all);
# endif
  return all;
}
# endmacro

{# The 32 weights of chunk c as floats. #}
# macro decode(w, offset, minimum)
fn {{ w }}_floats(v: Ints) -> array<vec4<f32>, 8> {
  return array<vec4<f32>, 8>(
  # for i in range(8)
  # set half = "xy"[i // 4]
  # set codes = "vec4<f32>(unpack4xI8(v.%s.%s))" % ("ab"[i // 4], "xyzw"[i % 4])
    v.s.{{ half }} * {{ "(%s - %d.0)" % (codes, offset) if offset else codes }}{{ " - v.m.%s" % half if minimum }}{{ "," if not loop.last }}
  # endfor
  );
}

fn {{ w }}_decode(c: u32) -> array<vec4<f32>, 8> {
  return {{ w }}_floats({{ w }}_ints({{ w }}_fetch(c), c));
}
# endmacro
