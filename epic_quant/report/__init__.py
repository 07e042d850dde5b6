"""From a run's JSON to `COMPARISON.md` and its plots, without torch: `python -m epic_quant.report out.json`.

reading -> Run -> sections -> blocks -> markdown -> writing
"""
