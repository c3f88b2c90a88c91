"""What is this machine, and who takes part? Device, BLAS, memory, and the processes of a distributed run."""
