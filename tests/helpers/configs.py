"""The configuration that most tiny models are made from."""

from transformers import LlamaConfig


def tiny_llama_config(**changes) -> LlamaConfig:
    """A Llama of two layers and a window of 64 tokens; the head counts split by KV heads."""
    values = dict(
        vocab_size=97,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    return LlamaConfig(**{**values, **changes})
