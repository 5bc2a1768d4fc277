{# Sum or maximum of one value per thread over a workgroup of `wg` threads; every thread gets the result.
   With `subgroup` (the size of every subgroup) two levels and two barriers; without, a tree in shared memory.
   The last barrier is for who calls it again: not with `once`. #}
# macro workgroup_reduce(name, op, wg, subgroup, once=false)
# set combine = {"add": "a + b", "max": "max(a, b)"}[op]
var<workgroup> {{ name }}_shared: array<f32, {{ wg // subgroup if subgroup else wg }}>;

fn {{ name }}_pair(a: f32, b: f32) -> f32 {
  return {{ combine }};
}

fn {{ name }}(value: f32, lid: u32) -> f32 {
# if subgroup
  let part = {{ {"add": "subgroupAdd", "max": "subgroupMax"}[op] }}(value);
  if (lid % {{ subgroup }}u == 0u) {
    {{ name }}_shared[lid / {{ subgroup }}u] = part;
  }
  workgroupBarrier();
# set parts = wg // subgroup
# if parts <= subgroup
  let lane = lid % {{ subgroup }}u;
  let other = {{ name }}_shared[min(lane, {{ parts - 1 }}u)];
  let total = {{ "subgroupMax(other)" if op == "max" else "subgroupAdd(select(0.0, other, lane < %du))" % parts }};
# else
  var total = {{ name }}_shared[0];
  for (var i = 1u; i < {{ parts }}u; i++) {
    total = {{ name }}_pair(total, {{ name }}_shared[i]);
  }
# endif
{{ "  workgroupBarrier();" if not once }}
  return total;
# else
  {{ name }}_shared[lid] = value;
  for (var stride = {{ wg // 2 }}u; stride > 0u; stride >>= 1u) {
    workgroupBarrier();
    if (lid < stride) {
      {{ name }}_shared[lid] = {{ name }}_pair({{ name }}_shared[lid], {{ name }}_shared[lid + stride]);
    }
  }
  workgroupBarrier();
  let total = {{ name }}_shared[0];
{{ "  workgroupBarrier();" if not once }}
  return total;
# endif
}
# endmacro
