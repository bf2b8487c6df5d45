"""The command `longlora`: a parser, and one file a command. Nothing imports it."""
