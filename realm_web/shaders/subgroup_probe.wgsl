// What subgroups look like here: out[thread] = size of its subgroup * 65536 + its place in it.
// constants: none;  grid: (1, 1, 1)
enable subgroups;
{{ bind("out", "u32", "read_write") }}

@compute @workgroup_size(256)
fn main(
  @builtin(local_invocation_index) lid: u32,
  @builtin(subgroup_size) size: u32,
  @builtin(subgroup_invocation_id) place: u32,
) {
  out[lid] = size * 65536u + place;
}
