"""The command line: thin verbs over the packages. Nobody imports it."""
