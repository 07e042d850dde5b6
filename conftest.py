"""Both suites' glue: the plugin gives the options, the fixtures and the run facts."""

pytest_plugins = ["epic_quant.plugin"]
