"""Which settings are worth it? A grid or a list of changes over one base becomes trials, each a run directory
like any other, and the trials become one comparison.

`spec` reads the file, `trials` makes settings and commands of it, `ledger` keeps ``sweep.json``, `execution`
runs the processes as far as there is `room`, `racing` stops trials that are behind, `search` asks Optuna,
`measured` reads what trials scored, `contrasts` is the statistics, `outcome` the result, `screen` and `page`
show it. `probe` finds a learning rate before a run."""
