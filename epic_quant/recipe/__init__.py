"""The best assignment of bits within a byte budget: `python -m epic_quant.recipe out.json --budget 3.5GB`.

results -> units with their choices -> knapsack -> Recipe -> a policy string
"""
