"""The verbs that command line, control socket and test plugin share."""
