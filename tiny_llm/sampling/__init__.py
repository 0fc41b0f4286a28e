"""From logits to a token: ``sampler`` draws, ``logprobs`` reports how likely it was."""
