"""The command line, the demo and HTML reports."""
