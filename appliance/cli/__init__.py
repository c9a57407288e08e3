"""The command line: thin, the only home of click, one file per noun."""
