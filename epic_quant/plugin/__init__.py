"""The pytest plugins, one a module: what is measured, and what is printed before, during and after it."""

pytest_plugins = [
    "epic_quant.plugin.options",
    "epic_quant.plugin.session",
    "epic_quant.plugin.journal",
    "epic_quant.plugin.fixtures",
    "epic_quant.plugin.progress",
    "epic_quant.plugin.planning",
    "epic_quant.plugin.outcome",
]
