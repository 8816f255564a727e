"""Text generation with a cache of keys and values, and continuous batching.

- weights, decoder: the model as it decodes; programs: the compiled prefill and decode steps; sampling: how a token is
  drawn; generator: the host's side, which schedules requests.
- request: a prompt and its continuation. slot: a row of the batch, held by one request at a time.
- window: the newest tokens of a request, which the model sees; at most `context` of them.

It imports from `model` alone, and nothing in `model` imports it.
"""
