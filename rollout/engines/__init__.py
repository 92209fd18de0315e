"""Engines: token ids in, completions out.

`interface` says what an engine is. `vllm_engine` samples in this process, `transformers_engine` where vLLM will not start,
`server_engine` through a running `vllm serve`, `ray_engine` with many engines. `starting` makes the one that options name,
`policy_link` and `lora` bring the policy to it, `isolation` finds the prompt that makes an engine fail.
"""
