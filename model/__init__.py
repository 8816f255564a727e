"""The model that is trained: the five floors of a decoder, its parameters and its loss, as pure functions of arrays.

- floor: one of the five stages of the decoder (embedding, position, attention, feed-forward, unembedding), each in its
  own file; `decoder` stacks them.
- layout: the table from logical axes ("batch", "heads", ...) to mesh axes (`sharding`). The model names logical axes
  alone, and knows neither devices nor files.
- Shapes are suffixes of names: B batch, T time, S keys, D model width, H heads, K key/value heads, C head width,
  F feed-forward width, V padded vocabulary, L layers, N any other number.

The room imports neither `data`, `train` nor `launch`. Of its inner rooms, `generation` continues prompts and
`interchange` converts weights of other libraries; the files here import neither.
"""
