"""The model engine: a transformers model whose KV-Cache lives in memory of ours.

The model code is the library's own (Llama, Qwen2, Qwen3 and every decoder that dispatches through transformers' attention
interface). What is ours is where keys and values lie and when a layer may run:

- `model.load_model` loads a checkpoint directory with our attention function in place of the library's.
- `prefill.PrefillRunner` runs one packed batch of chunks through a `window.LayerWindow`, asking a `LayerGate` before and after the
  attention of every layer (layerwise prefill, paper section 4).
- `decode.DecodeRunner` gives every running sequence one token a step (continuous batching) over a `pool.PagedPool`.
- `sampling` and `finish` decide what is drawn and when it ends; both are pure.

Runners are plain blocking objects for one thread: an actor calls them from its compute thread and does its I/O elsewhere.

How this maps onto vLLM (a later engine behind the same actors). A connector derived from vLLM's `KVConnectorBase_V1` would be
written in terms of the same few words:

| here                                              | KVConnectorBase_V1                                                              |
|---------------------------------------------------|---------------------------------------------------------------------------------|
| `PrefillChunk.cached_tokens`                      | `get_num_new_matched_tokens` (whole blocks, at least one token left to compute)  |
| `first_row` / `DecodeSequence.blocks`             | `update_state_after_alloc` (block ids), carried by `build_connector_meta`       |
| `LayerGate.enter(layer)`                          | `wait_for_layer_load(layer_name)`                                               |
| `LayerGate.leave(layer)`                          | `save_kv_layer(layer_name, kv, metadata)`                                       |
| return of `PrefillRunner.run`                     | `wait_for_save`, then the sampler                                               |
| `LayerWindow.tensor`, `PagedPool.tensor`          | `register_kv_caches` (per layer, block index first)                             |
| `StepOutput.kv_tokens`, release of a block table  | `get_finished`, `request_finished` (blocks kept until the connector lets go)    |
| a DualPathError raised by `enter`                 | `get_block_ids_with_load_errors`                                                |

vLLM allocates all layers of a request at once, so with it the window is the whole pool: the layer gates keep their meaning (load and
compute overlap), the saving of memory does not.
"""
