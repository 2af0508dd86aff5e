"""Where the parts of each family's decoder are: the rows of `families` name them."""

from __future__ import annotations

from sq_cpu.models.family import Decoder

LLAMA = Decoder()

PHI = Decoder(
    final_norm="final_layernorm",
    q_norm="self_attn.q_layernorm",
    k_norm="self_attn.k_layernorm",
    attention_out="self_attn.dense",
    mlp_norm="input_layernorm",
    gate_up=("mlp.fc1",),
    gated=False,
    down="mlp.fc2",
    parallel=True,
)

PHI3 = Decoder(qkv=("self_attn.qkv_proj",), gate_up=("mlp.gate_up_proj",))

GLM = Decoder(gate_up=("mlp.gate_up_proj",), interleaved=True)

GLM4 = Decoder(
    gate_up=("mlp.gate_up_proj",),
    interleaved=True,
    after_attention="post_self_attn_layernorm",
    after_mlp="post_mlp_layernorm",
)

GEMMA_2 = Decoder(
    after_attention="post_attention_layernorm",
    mlp_norm="pre_feedforward_layernorm",
    after_mlp="post_feedforward_layernorm",
    activation="hidden_activation",
)

OLMO_2 = Decoder(
    attention_norm=None,
    mlp_norm=None,
    after_attention="post_attention_layernorm",
    after_mlp="post_feedforward_layernorm",
)

STABLELM = Decoder(parallel="use_parallel_residual")

OPT = Decoder(
    base="decoder",
    positions="embed_positions",
    own_positions=True,
    final_norm="final_layer_norm",
    scale="self_attn.scaling",
    attention_norm="self_attn_layer_norm",
    attention_out="self_attn.out_proj",
    mlp_norm="final_layer_norm",
    gate_up=("fc1",),
    gated=False,
    down="fc2",
    activation="activation_function",
)

GPT2 = Decoder(
    blocks="h",
    embedding="wte",
    positions="wpe",
    final_norm="ln_f",
    attention="attn",
    attention_norm="ln_1",
    qkv=("attn.c_attn",),
    attention_out="attn.c_proj",
    mlp_norm="ln_2",
    gate_up=("mlp.c_fc",),
    gated=False,
    down="mlp.c_proj",
    activation="activation_function",
)

GPTJ = Decoder(
    blocks="h",
    embedding="wte",
    final_norm="ln_f",
    rotary_table="attn.embed_positions",
    interleaved=True,
    attention="attn",
    own_attention=True,
    attention_norm="ln_1",
    qkv=("attn.q_proj", "attn.k_proj", "attn.v_proj"),
    attention_out="attn.out_proj",
    mlp_norm="ln_1",
    gate_up=("mlp.fc_in",),
    gated=False,
    down="mlp.fc_out",
    parallel=True,
    activation="activation_function",
)

GPT_NEOX = Decoder(
    embedding="embed_in",
    final_norm="final_layer_norm",
    attention="attention",
    head_dim="head_size",
    qkv=("attention.query_key_value",),
    qkv_by_head=True,
    attention_out="attention.dense",
    gate_up=("mlp.dense_h_to_4h",),
    gated=False,
    down="mlp.dense_4h_to_h",
    parallel="use_parallel_residual",
)

BLOOM = Decoder(
    blocks="h",
    embedding="word_embeddings",
    embedding_norm="word_embeddings_layernorm",
    final_norm="ln_f",
    attention="self_attention",
    own_attention=True,
    alibi="alibi",
    qkv=("self_attention.query_key_value",),
    qkv_by_head=True,
    attention_out="self_attention.dense",
    gate_up=("mlp.dense_h_to_4h",),
    gated=False,
    down="mlp.dense_4h_to_h",
    activation="gelu_new",
)

# ALiBi's biases are rounded to bf16, so that from position 257 on they are no slope times position.
# In all of its layouts the rows of qkv are by kv head: one of all query heads, or one of each.
FALCON = Decoder(
    blocks="h",
    embedding="word_embeddings",
    final_norm="ln_f",
    attention="self_attention",
    own_attention=True,
    attention_norm=("ln_attn", "input_layernorm"),
    qkv=("self_attention.query_key_value",),
    qkv_by_head=True,
    attention_out="self_attention.dense",
    mlp_norm=("ln_mlp", "post_attention_layernorm"),
    gate_up=("mlp.dense_h_to_4h",),
    gated=False,
    down="mlp.dense_4h_to_h",
    parallel="parallel_attn",
    activation="activation",
    when={"alibi": False},
)

MPT = Decoder(
    blocks="blocks",
    embedding="wte",
    final_norm="norm_f",
    attention="attn",
    own_attention=True,
    scale="attn.softmax_scale",
    alibi="position_bias",
    attention_norm="norm_1",
    qkv=("attn.Wqkv",),
    attention_out="attn.out_proj",
    mlp_norm="norm_2",
    gate_up=("ffn.up_proj",),
    gated=False,
    down="ffn.down_proj",
    activation="gelu",
    when={"attn_config.clip_qkv": None},
)
