"""A tiny LLaMA's shape and how it is measured: what the tests of the benchmark of models share."""

from whole_model import Settings

TINY = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 320,
}
# Random and tiny: int8 errs more than in a real model.
SETTINGS = Settings(
    layers=None,
    kinds=("int8", "fused", "generate", "llama.cpp", "openvino", "bf16", "fp32"),
    schemes=("O1",),
    prompts=(8,),
    contexts=(6,),
    tokens=3,
    rows=(1, 2),
    least_cosine=0.9,
    limit=120,
)
