// Reads all of x once and does next to nothing with it: the bandwidth that a kernel can have.
// x (n,) vec4;  out (1,) u32: written only by chance, so that no load can be left out
// constants: n, stride (threads);  grid: (stride / 256, 1, 1)
{{ bind("x", "vec4<u32>") }}
{{ bind("out", "u32", "read_write") }}

@compute @workgroup_size(256)
fn main(@builtin(global_invocation_id) id: vec3<u32>) {
  var total = vec4<u32>();
  for (var i = id.x; i < {{ n }}u; i += {{ stride }}u) {
    total ^= x[i];
  }
  if ((total.x ^ total.y ^ total.z ^ total.w) == 0x9e3779b9u) {
    out[0] = id.x;
  }
}
