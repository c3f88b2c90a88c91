"""Who asks a model over HTTP, and what do they get? OpenAI's protocol, answered by one engine with a base and
any number of its adapters."""
