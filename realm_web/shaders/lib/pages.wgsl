{# Pages of the KV cache. A page holds `block_size` tokens of one kv head, seen in units of eight values: in f16 a unit is
   a vec4<u32>, in f32 two of them, in q8_0 a vec2<u32> of signed bytes. Behind the bytes of all tokens of a q8_0 page
   are their scales, a float16 for every 32 values, padded to whole words per token. #}

{# The type of the binding's elements. #}
# macro element(kv)
{{ "vec2<u32>" if kv == "q8_0" else "vec4<u32>" }}
{%- endmacro %}

{# How many elements a page is. #}
# macro size(kv, head_dim, block_size)
# if kv == "q8_0"
{{ block_size * head_dim // 8 + block_size * ((head_dim + 63) // 64) // 2 }}
{%- else %}
{{ block_size * head_dim // (8 if kv == "f16" else 4) }}
{%- endif %}
{%- endmacro %}

# macro types(kv)
struct Eight {
  a: vec4<f32>,
  b: vec4<f32>,
}

// A unit as it is stored; a q8_0 one with the bits of its scale.
struct Raw {
  # if kv == "q8_0"
  a: vec2<u32>,
  scale: u32,
  # else
  a: vec4<u32>,
  # if kv == "f32"
  b: vec4<u32>,
  # endif
  # endif
}

# if kv == "q8_0"
fn four(word: u32) -> vec4<f32> {
  return vec4<f32>(unpack4xI8(word));
}

// The values of a unit before they are multiplied by `scale_of`.
fn unscaled(raw: Raw) -> Eight {
  return Eight(four(raw.a.x), four(raw.a.y));
}

fn scale_of(raw: Raw) -> f32 {
  return unpack2x16float(raw.scale).x;
}

# endif
fn decoded(raw: Raw) -> Eight {
  # if kv == "f16"
  return Eight(
    vec4<f32>(unpack2x16float(raw.a.x), unpack2x16float(raw.a.y)),
    vec4<f32>(unpack2x16float(raw.a.z), unpack2x16float(raw.a.w)),
  );
  # elif kv == "f32"
  return Eight(bitcast<vec4<f32>>(raw.a), bitcast<vec4<f32>>(raw.b));
  # else
  let values = unscaled(raw);
  return Eight(values.a * scale_of(raw), values.b * scale_of(raw));
  # endif
}
# endmacro

{# Read a unit of token t of the page that begins at element `page`. #}
# macro reads(name, kv, head_dim, block_size)
fn {{ name }}_raw(page: u32, t: u32, unit: u32) -> Raw {
  # if kv == "f16"
  return Raw({{ name }}[page + t * {{ head_dim // 8 }}u + unit]);
  # elif kv == "f32"
  let at = page + t * {{ head_dim // 4 }}u + 2u * unit;
  return Raw({{ name }}[at], {{ name }}[at + 1u]);
  # else
  let word = t * {{ (head_dim + 63) // 64 }}u + unit / 8u;
  let pair = {{ name }}[page + {{ block_size * head_dim // 8 }}u + word / 2u];
  let scales = select(pair.x, pair.y, (word & 1u) == 1u);
  return Raw({{ name }}[page + t * {{ head_dim // 8 }}u + unit], select(scales, scales >> 16u, (unit & 4u) == 4u) & 0xffffu);
  # endif
}
# endmacro

{# Make units out of workgroup memory `fresh`, which holds float32 values of a head from index `head` on. `scales_of` must
   be called for all units before any value in `fresh` changes. #}
# macro makes(kv, head_dim)
fn fresh_unit(at: u32) -> Eight {
  return Eight(
    vec4<f32>(fresh[at], fresh[at + 1u], fresh[at + 2u], fresh[at + 3u]),
    vec4<f32>(fresh[at + 4u], fresh[at + 5u], fresh[at + 6u], fresh[at + 7u]),
  );
}

# if kv == "q8_0"
// The largest of the 32 values that share a scale with value d; 0 beyond the head.
fn largest(head: u32, d: u32) -> f32 {
  var top = 0.0;
  for (var i = d / 32u * 32u; i < min(d / 32u * 32u + 32u, {{ head_dim }}u); i++) {
    top = max(top, abs(fresh[head + i]));
  }
  return top;
}

// For a unit: the factor of its values, and the two scales of the word that it writes if it is the first of eight.
struct Scales {
  inverse: f32,
  word: u32,
}

fn scales_of(head: u32, unit: u32) -> Scales {
  let top = largest(head, 8u * unit);
  let next = largest(head, 8u * unit + 32u);
  return Scales(select(0.0, 127.0 / top, top > 1e-30), pack2x16float(vec2<f32>(top, next) / 127.0));
}

fn bytes_of(values: vec4<f32>) -> u32 {
  let bytes = vec4<u32>(vec4<i32>(round(values))) & vec4<u32>(255u);
  return bytes.x | (bytes.y << 8u) | (bytes.z << 16u) | (bytes.w << 24u);
}

fn made(values: Eight, scales: Scales) -> Raw {
  return Raw(vec2<u32>(bytes_of(values.a * scales.inverse), bytes_of(values.b * scales.inverse)), scales.word & 0xffffu);
}
# else
struct Scales {
  none: u32,
}

fn scales_of(head: u32, unit: u32) -> Scales {
  return Scales(0u);
}

fn made(values: Eight, scales: Scales) -> Raw {
  # if kv == "f16"
  return Raw(vec4<u32>(
    pack2x16float(values.a.xy), pack2x16float(values.a.zw), pack2x16float(values.b.xy), pack2x16float(values.b.zw),
  ));
  # else
  return Raw(bitcast<vec4<u32>>(values.a), bitcast<vec4<u32>>(values.b));
  # endif
}
# endif
# endmacro

{# A value as the pages give it back, where it can be told from the value alone. #}
# macro rounds(kv)
fn rounded(value: f32) -> f32 {
  return {{ "unpack2x16float(pack2x16float(vec2<f32>(value, 0.0))).x" if kv == "f16" else "value" }};
}
# endmacro

{# Write a unit of token t, and the scales with the first unit of each eight. #}
# macro writes(name, kv, head_dim, block_size)
fn {{ name }}_write(page: u32, t: u32, unit: u32, raw: Raw, scales: Scales) {
  # if kv == "f32"
  let at = page + t * {{ head_dim // 4 }}u + 2u * unit;
  {{ name }}[at] = raw.a;
  {{ name }}[at + 1u] = raw.b;
  # else
  {{ name }}[page + t * {{ head_dim // 8 }}u + unit] = raw.a;
  # if kv == "q8_0"
  if (unit % 8u == 0u) {
    let word = t * {{ (head_dim + 63) // 64 }}u + unit / 8u;
    let at = page + {{ block_size * head_dim // 8 }}u + word / 2u;
    if ((word & 1u) == 0u) {
      {{ name }}[at].x = scales.word;
    } else {
      {{ name }}[at].y = scales.word;
    }
  }
  # endif
  # endif
}
# endmacro

{# The page of position p for kv head `kv_head`: by the sequence's table, or in the ring of its slot. #}
# macro page_of(kv, n_kv, head_dim, block_size, ring)
fn page_of(p: u32, table: u32, kv_head: u32) -> u32 {
  # if ring
  let block = table + p / {{ block_size }}u % {{ ring }}u;
  # else
  let block = step[table + p / {{ block_size }}u];
  # endif
  return (block * {{ n_kv }}u + kv_head) * {{ size(kv, head_dim, block_size) }}u;
}
# endmacro

{# Where the table of sequence `seq` begins in the step, or the first page of its slot's ring. #}
# macro table_of(seq, ring, st)
# if ring
step[{{ st.seqs }}u + {{ seq }} * {{ st.SEQ_WORDS }}u + {{ st.SLOT }}u] * {{ ring }}u
{%- else %}
{{ st.tables }}u + {{ seq }} * {{ st.max_blocks }}u
{%- endif %}
{%- endmacro %}
