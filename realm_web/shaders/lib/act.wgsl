{# The product of a gate, through its activation, and a value, both of type `t`.
   swiglu_oai is gpt-oss' SwiGLU: both clamped, the sigmoid steeper, one added to the value. #}
# macro gated(act, gate, value, t="f32")
# if act == "silu_mul"
{{ gate }} / (1.0 + exp(-{{ gate }})) * {{ value }}
# elif act == "gelu_mul"
0.5 * {{ gate }} * (1.0 + tanh(clamp(0.7978845608 * ({{ gate }} + 0.044715 * {{ gate }} * {{ gate }} * {{ gate }}), {{ gate }} * 0.0 - 15.0, {{ gate }} * 0.0 + 15.0))) * {{ value }}
# elif act == "swiglu_oai"
min({{ gate }}, {{ t }}(7.0)) / (1.0 + exp(-1.702 * min({{ gate }}, {{ t }}(7.0)))) * (clamp({{ value }}, {{ t }}(-7.0), {{ t }}(7.0)) + 1.0)
# endif
# endmacro
