{# The sums acc0, acc1, ... over `lanes` neighbouring threads, which share a row of weights: the first of them gets the
   totals. With `subgroup` (the size of every subgroup) lanes are a multiple of it, or 1. #}
# macro shared(n_acc, lanes, wg, subgroup)
# if lanes > 1 and lanes != subgroup
var<workgroup> partial: array<f32, {{ n_acc * (wg // subgroup if subgroup else wg) }}>;
# endif
# endmacro

# macro add(n_acc, lanes, wg, subgroup)
# set each = subgroup or 1
# if subgroup and lanes > 1
# for a in range(n_acc)
  acc{{ a }} = subgroupAdd(acc{{ a }});
# endfor
# endif
# if lanes > each
  if (lid % {{ each }}u == 0u) {
# for a in range(n_acc)
    partial[{{ a * (wg // each) }}u + lid / {{ each }}u] = acc{{ a }};
# endfor
  }
  workgroupBarrier();
  if (lane == 0u) {
    for (var i = 1u; i < {{ lanes // each }}u; i++) {
# for a in range(n_acc)
      acc{{ a }} += partial[{{ a * (wg // each) }}u + lid / {{ each }}u + i];
# endfor
    }
  }
# endif
# endmacro
