"""From a run's JSON to a page, Markdown with plots or CSV, without torch: `python -m epic_quant.report out.json`.

reading -> Run -> sections -> blocks -> html, markdown -> writing
"""
