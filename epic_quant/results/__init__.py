"""One run of the benchmarks, read from its JSON: its facts, its records, and what single classes predict of a policy.

What the report and the recipe stand on. Standard library only, so that neither imports torch.
"""
