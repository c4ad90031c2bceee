"""Plans: a cell recorded as a program, its operations coloured by where in a sequence they run."""
