"""The bits that a byte budget is best spent on: `python -m epic_quant.recipe out.json --budget 3.5GB`.

results -> units with their choices -> integer program -> Recipe -> a policy string, or llama.cpp's arguments
"""
