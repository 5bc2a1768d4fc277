{# Products of integer weights with activations of 8 bits, a chunk of 32 at a time.

   A format's `ints` macro declares its bindings; a struct {w}_Raw with {w}_fetch(c), the loads of chunk c and nothing
   else, so that many can be under way; and {w}_ints(raw, c), the chunk as Ints. A weight is s * (byte - offset) - m: the
   format says its `offset`, whether its two `halves` have scales of their own (else s.x is for both), and whether there is a
   `minimum`: none, of the "chunk" (m.x) or of its "halves".

   Activations are x = d * byte, d of a chunk; beside them stand the sums of the bytes of both halves, which is all that
   offset and minimum need. A row of k of them is chunks = k / 32 vec4 of first halves, as many of second halves, and for
   every two chunks a vec4 of d, sums (int16, the first half's low), d, sums. #}

{# How many vec4 that is. #}
# macro row_vec4s(k)
{{ k // 16 + (k // 32 + 1) // 2 }}
# endmacro

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
  sums: vec2<i32>,
}

fn dot16(a: vec4<u32>, b: vec4<u32>) -> i32 {
  return dot4I8Packed(a.x, b.x) + dot4I8Packed(a.y, b.y) + dot4I8Packed(a.z, b.z) + dot4I8Packed(a.w, b.w);
}

fn two_sums(word: u32) -> vec2<i32> {
  return vec2<i32>(bitcast<i32>(word << 16u), bitcast<i32>(word)) >> vec2<u32>(16u);
}
# endmacro

{# Chunk c of row m of the activations in the binding x. #}
# macro activations(x, k)
fn {{ x }}_fetch(m: u32, c: u32) -> Activations {
  let row = m * {{ row_vec4s(k) | trim }}u;
  let pair = {{ x }}[row + {{ k // 16 }}u + (c >> 1u)];
  let own = select(pair.xy, pair.zw, (c & 1u) == 1u);
  return Activations({{ x }}[row + c], {{ x }}[row + {{ k // 32 }}u + c], bitcast<f32>(own.x), two_sums(own.y));
}
# endmacro

{# Activations of one row that the workgroup makes for itself: a plane for each of the 8 words of a chunk, one of d, one of
   sums. Planes are 4 words apart modulo 32, so that the lanes that write a chunk meet no bank twice. #}
# macro plane(k)
{{ k // 32 + (4 - k // 32) % 32 }}
# endmacro

# macro own_activations(x, k)
# set p = plane(k) | trim | int
var<workgroup> {{ x }}_own: array<u32, {{ 10 * p }}>;

fn {{ x }}_fetch(m: u32, c: u32) -> Activations {
  return Activations(
  # for first in (0, 4)
    vec4<u32>({% for i in range(first, first + 4) %}{{ x }}_own[c + {{ i * p }}u]{{ ", " if not loop.last }}{% endfor %}),
  # endfor
    bitcast<f32>({{ x }}_own[c + {{ 8 * p }}u]),
    two_sums({{ x }}_own[c + {{ 9 * p }}u])
  );
}
# endmacro

# macro product(offset, halves, minimum)
fn product(w: Ints, x: Activations) -> f32 {
# if halves
  let sum = w.s.x * f32(dot16(w.a, x.a){{ " - %d * x.sums.x" % offset if offset }})
    + w.s.y * f32(dot16(w.b, x.b){{ " - %d * x.sums.y" % offset if offset }});
# else
  let sum = w.s.x * f32(dot16(w.a, x.a) + dot16(w.b, x.b){{ " - %d * (x.sums.x + x.sums.y)" % offset if offset }});
# endif
# if minimum == "chunk"
  return x.d * (sum - w.m.x * f32(x.sums.x + x.sums.y));
# elif minimum == "halves"
  return x.d * (sum - (w.m.x * f32(x.sums.x) + w.m.y * f32(x.sums.y)));
# else
  return x.d * sum;
# endif
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
