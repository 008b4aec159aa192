"""The picture of an allocation, letter by letter."""

from llmq.drawing import allocation_picture


def test_one_letter_per_block_and_kind():
    layers = [(f"model.layers.{i}.mlp.up_proj", "int4 g64 asymmetric") for i in range(12)]
    layers += [(f"model.layers.{i}.self_attn.q_proj", "int3 g64 asymmetric") for i in (0, 11)]
    layers += [("lm_head", "int8 g64 asymmetric"), ("(3 others)", "bfloat16")]
    assert allocation_picture(layers).splitlines() == [
        "block             0         1",
        "                  012345678901",
        "mlp.up_proj       444444444444",
        "self_attn.q_proj  3..........3",
    ]


def test_equal_widths_need_no_picture():
    assert allocation_picture([("model.layers.0.mlp.up_proj", "int4 g64 symmetric")]) == ""
    assert allocation_picture([]) == ""
