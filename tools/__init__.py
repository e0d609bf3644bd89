"""The command line: thin verbs over the packages. No other package imports it."""
