{# Loads of chunks: a struct {w}_Raw with the codes q and the other words of a chunk, and {w}_fetch(c). With `run` 2 in its place
   {w}_fetch_run(c), which loads chunks c (an even number) and c + 1 at once, with what they share: `rest`, expressions in c by
   name, are of blocks of at least two chunks. #}

{# The binding of q, `type` per chunk. #}
# macro codes(w, bind, type, run)
{{ bind(w ~ "_q", {"u32": "vec2<u32>", "vec2<u32>": "vec4<u32>"}[type] if run == 2 else type) }}
# endmacro

# macro fetch(w, type, run, rest)
struct {{ w }}_Raw {
  q: {{ type }},
  # for name in rest
  {{ name }}: u32,
  # endfor
}

# set ends = ("x", "y") if type == "u32" else ("xy", "zw")
# if run == 2
fn {{ w }}_fetch_run(c: u32) -> array<{{ w }}_Raw, 2> {
  let q = {{ w }}_q[c >> 1u];
# else
fn {{ w }}_fetch(c: u32) -> {{ w }}_Raw {
  let q = {{ w }}_q[c];
# endif
  # for name, expression in rest.items()
  let {{ name }} = {{ expression }};
  # endfor
  # if run == 2
  return array<{{ w }}_Raw, 2>({% for part in ends %}{{ w }}_Raw(q.{{ part }}, {{ rest | join(", ") }}){{ ", " if loop.first }}{% endfor %});
  # else
  return {{ w }}_Raw(q, {{ rest | join(", ") }});
  # endif
}
# endmacro
