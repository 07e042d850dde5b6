"""One run of the benchmarks, read from its JSON: its facts, its records, and what single classes predict of a policy.

The report and the recipe build on it. Standard library only, so that neither imports torch.
"""
