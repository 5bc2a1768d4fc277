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

{# The sums of `count` values, {name}{first}, {name}{first + step}..., each over `lanes` neighbouring threads of one subgroup, spread
   over those threads: of half of the values a thread hands on its part and takes in the other's, until it has no more than one;
   that is as many shuffles as values, where adding each up for all would take log2(lanes) times as many. Lane a * apart then has
   the totals a * kept to a * kept + kept - 1, in the first `kept` of the values. #}
# macro spread(name, first, step, count, lanes)
# set ns = namespace(d=lanes // 2, count=count)
# for _ in range(7)
# if ns.d >= 1
# if ns.count > 1 and ns.count % 2 == 0
  {
    let upper = (lane & {{ ns.d }}u) != 0u;
# set half = ns.count // 2
# for i in range(half)
# set a = name ~ (first + i * step)
# set b = name ~ (first + (i + half) * step)
    {{ a }} = select({{ a }}, {{ b }}, upper) + subgroupShuffleXor(select({{ b }}, {{ a }}, upper), {{ ns.d }}u);
# endfor
  }
# set ns.count = half
# else
# for i in range(ns.count)
  {{ name }}{{ first + i * step }} += subgroupShuffleXor({{ name }}{{ first + i * step }}, {{ ns.d }}u);
# endfor
# endif
# set ns.d = ns.d // 2
# endif
# endfor
# endmacro

{# How often `count` can be halved, at most so often that `lanes` come to one: as a power of two. #}
# macro halved(count, lanes)
# set ns = namespace(count=count, times=1)
# for _ in range(7)
# if ns.count % 2 == 0 and ns.times < lanes
# set ns.count = ns.count // 2
# set ns.times = ns.times * 2
# endif
# endfor
{{ ns.times }}
# endmacro

# macro kept(count, lanes)
{{ count // (halved(count, lanes) | int) }}
# endmacro

# macro apart(count, lanes)
{{ lanes // (halved(count, lanes) | int) }}
# endmacro
