"""What can be done with `unrolled`: programs to run, and published cells to look at."""
