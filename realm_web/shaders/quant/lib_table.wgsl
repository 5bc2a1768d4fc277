{# A table of n rows in workgroup memory, each as often beside itself as `room` bytes allow: lanes look up rows far apart, which
   in a cache costs three times as much, and those that meet a bank one turn each. With a copy for every lane none meet. #}

{# How many copies of n rows of `size` bytes; more than one for every bank (size 4) or two of them (size 8) help nobody. #}
# macro copies(n, size, room)
# set ns = namespace(copies=1)
# for _ in range(5)
# if 2 * ns.copies * n * size <= room and 2 * ns.copies * size <= 128
# set ns.copies = 2 * ns.copies
# endif
# endfor
{{ ns.copies }}
# endmacro

{# {w}_rows, which {w}_prepare fills with wg threads from {w}_row(i), and {w}_at(i, c), row i for the lane of chunk c,
   if neighbouring lanes have neighbouring runs of `run` chunks. #}
# macro rows(w, type, n, wg, room, run=1)
# set size = 8 if type == "vec2<u32>" else 4
# set copies = copies(n, size, room) | int
# set ns = namespace(threads=1)
# for _ in range(5)
# if 2 * ns.threads * n <= wg and 2 * ns.threads <= copies and wg % (2 * ns.threads) == 0
# set ns.threads = 2 * ns.threads
# endif
# endfor
# set threads, each = ns.threads, copies // ns.threads
# set apart = [128 // size // copies, 1] | max
var<workgroup> {{ w }}_rows: array<{{ type }}, {{ n * copies }}>;

fn {{ w }}_prepare(lid: u32) {
  # set step = wg // threads
  # set passes = n // step
  # if threads > 1
  let first = lid % {{ threads }}u * {{ each }}u;
  # endif
  let i0 = lid{{ " / %du" % threads if threads > 1 }};
  # macro put(i, row)
    # if copies == 1
  {{ w }}_rows[{{ i }}] = {{ row }};
    # else
  // threads begin at copies of their own, so that they meet no bank
    # for j in range(each)
  {{ w }}_rows[{{ i }} * {{ copies }}u{{ " + first" if threads > 1 }} + ({{ j }}u + {{ i }} / {{ apart }}u) % {{ each }}u] = {{ row }};
    # endfor
    # endif
  # endmacro
  # if n % step == 0
  # for p in range(passes)
  let i{{ p + 1 }} = i0 + {{ p * step }}u;
  let row{{ p + 1 }} = {{ w }}_row(i{{ p + 1 }});
  # endfor
  # for p in range(passes)
{{ put("i%d" % (p + 1), "row%d" % (p + 1)) }}
  # endfor
  # else
  for (var i = i0; i < {{ n }}u; i += {{ step }}u) {
    let row = {{ w }}_row(i);
{{ put("i", "row") }}
  }
  # endif
}

fn {{ w }}_at(i: u32, c: u32) -> {{ type }} {
  return {{ w }}_rows[{{ "(i * %du) | (c / %du %% %du)" % (copies, run, copies) if copies > 1 else "i" }}];
}
# endmacro
