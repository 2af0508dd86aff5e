"""Checkpoints: safetensors files beside a config.json that describes them. No pickle anywhere.

A checkpoint is a folder as transformers writes it, with int8 weights where a linear was quantized:

    config.json                  the model's config plus ``quantization_config`` (below)
    model.safetensors            or model-0000x-of-0000y.safetensors and an index of them
    README.md                    the model card
    search_curves.json           group -> [[alpha, loss], ...], where a search of alpha tried some
    generation_config.json, ...  what the model and the tokenizer add

A quantized linear ``L`` of shape [N, K] is stored unpacked, so that a file serves every machine:
``L.weight`` int8 [N, K, 1], ``L.weight_scale`` fp32 [N], ``L.bias`` fp32 [N] if it has one, and for
static schemes ``L.input_scale`` fp32 [] and ``L.input_zero_point`` int32 []; where the smoothing
scale was not folded into another layer, ``L.smoothing`` fp32 [K]. The weight's last dimension is
there for a loader that knows no sq_cpu: it raises, where it would take codes for a float weight.
A layer that is rotated has a weight of K rounded up to whole blocks of 64 columns, and
``L.hadamard`` int32 [], which is 64.
A prefix of P tokens, whose keys and values are the float model's, is ``sq_cpu_prefix.I.key`` and
``.value``, float [kv_heads, P, channels], for each layer I, and ``sq_cpu_prefix.hidden``
[P, hidden_size].
An embedding that reads the weight of an int8 head, to which it is tied, stores nothing.
A linear that keeps O outlier channels in float has a ``smoothing`` of 2^126 in those channels, and
also ``L.columns`` int64 [O] and ``L.outlier_weight`` [N, O] in the model's dtype. Everything else
is stored under its own name in its own dtype; tied weights are stored once. Buffers that no
state_dict has (rotary frequencies) are computed from the config, and stored where that gives other
values, as after a cast of the whole model.

The scheme of a layer is ``scheme``, but for the activations that ``plan`` gives it in ``layers``.

``quantization_config`` holds ``quant_method`` ("sq_cpu"), ``format_version``, the record of
:func:`sq_cpu.quantize` (``scheme``, ``plan``, ``layers``, and if any ``smoothed``, the layers with
a ``smoothing``, ``decomposed``, layer -> O, ``hadamard``, layer -> 64, the columns of a block that
the Hadamard matrix multiplies, ``prefix``, its ids, ``embeddings``, embedding -> the layer whose
weight it reads, ``misfits``, static layer -> the share of the calibration's rows that do not fit
its scale, and ``kept``, linear -> why it is in float), ``files`` (name -> SHA-256 of every
safetensors file), ``companions`` (names of the other files that :func:`save` wrote) and
``settings_sha256`` (of the JSON of ``quantization_config`` without this entry, its keys sorted).
All else in the folder may be edited.

The config of a model that is not of transformers has ``architectures``, the name of its class,
alone. All of its buffers are stored, and ``load`` fills an instance that it is given.

Versions up to 8 had no ``misfits``. Versions up to 7 had no ``prefix``, and no group in ``plan``
had ``hadamard_fold``. Versions up to 6 had no ``hadamard``. Versions up to 5 had no ``embeddings``.
Versions up to 4 had weights of [N, K], ``L.regular.weight`` and so on where L has outlier channels,
a table of digests as ``companions``, and ``config_sha256``, of all of config.json, which is not
looked at. Versions up to 3 had a group's ``curve`` in ``plan``, no search_curves.json, and in
``scheme`` ``weights`` "per_group" and ``weight_group_rows`` for "per_rows" and ``rows_per_scale``.
Versions 1 and 2 had ``groups`` alone in ``plan``; version 1 had no ``smoothed``, ``decomposed`` and
``kept``, and fewer fields in ``scheme``.
"""
