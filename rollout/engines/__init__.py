"""Engines: token ids in, completions out.

`interface` says what an engine is, and finds the prompt that makes one fail. `vllm_engine` samples in this process,
`transformers_engine` where vLLM will not start, `server_engine` through a running `vllm serve`, `ray_engine` with many engines.
`start` makes the one that options name, for jobs and for the trainer. `policy_link` is how the policy reaches it,
`shared_weights` how trainer and engine hold one copy of the base weights.
"""
