{# The product of a gate, through its activation, and a value. #}
# macro gated(act, gate, value)
# if act == "silu_mul"
{{ gate }} / (1.0 + exp(-{{ gate }})) * {{ value }}
# elif act == "gelu_mul"
0.5 * {{ gate }} * (1.0 + tanh(clamp(0.7978845608 * ({{ gate }} + 0.044715 * {{ gate }} * {{ gate }} * {{ gate }}), {{ gate }} * 0.0 - 15.0, {{ gate }} * 0.0 + 15.0))) * {{ value }}
# endif
# endmacro
