"""Does this device compute what torch, TRL and float64 compute, and how fast is it? For ``doctor --full``:
stages that each run in a process of their own, so that one which crashes or hangs is one line of the report
and the others go on."""
