"""The protocols of HTTP clients, one file each: a body becomes a `Question`, pieces become JSON or events."""
