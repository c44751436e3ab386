"""From a command line, a file and a recipe to a run with every field decided and everything impossible refused."""
