"""Executes the PTX that nvcc and Triton emit, on CPU tensors, and checks it as it runs.

parse      text to kernels                       floats, integers   arithmetic
flow       registers that may be undefined       accesses, warps    memory, atomics, lanes together
memory     regions, bounds, initialisation       machine, program   scheduling of threads and blocks
races      vector clocks                         axioms, relations, litmus: the memory model
cuda, cuda_build, runtime.cpp                    triton, triton_compiler
executor, targets                                what both backends share; targets of the suite
calls                                            of one backend, compared with torch's

Each launch is checked for bounds and alignment, writes to inputs, reads of memory or use of
registers that nobody wrote, outputs nobody wrote, lanes missing from a shuffle, barriers that not
all threads reach, a cp.async before its wait, and races. PTX is executed and not SASS: ptxas is
trusted, and ex2, rcp and the like are exact here.

What follows the project by itself: the launchers, the binding and the parameters, which are
compiled and run as they are, and the arguments of the kernels. What has to be edited when it
changes: in executor.py the parameters that a backend writes ("out", "grad_logits"); in triton.py
the names of the kernels in launch.py; in runtime.cpp a function of CUDA's runtime the launchers
come to call; in program.py and its builders an instruction that the compilers come to emit.
"""
