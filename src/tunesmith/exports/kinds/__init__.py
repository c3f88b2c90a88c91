"""The kinds of artefacts. A module here registers its kind (`tunesmith.exports.kind.register`)."""
