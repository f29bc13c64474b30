"""The terminal front of hessdiag: one file per command, each parses, calls and prints."""
